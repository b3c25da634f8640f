//! `token create`, `cert issue`, `join`: how machines and people get in.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockfilter::engine::real::RealFiles;
use clap::{Args, Subcommand};
use replicator::identity::{Authority, Role};
use replicator::token::{TokenOrder, Tokens};

use super::Context;
use crate::daemon;
use crate::daemon::remote;
use crate::daemon::target::{TargetConfig, identity_failure};
use crate::errors::{Exit, Failure, IoContext, Outcome};
use crate::units::{parse_duration, show_seconds};

/// What can be done with tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make another join token.
    Create(CreateArgs),
}

/// Arguments of `token create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// How long it can be used.
    #[arg(long, default_value = "1h", value_parser = parse_duration)]
    pub ttl: Duration,
    /// It may be used by several machines.
    #[arg(long)]
    pub reusable: bool,
}

/// `token create`.
pub fn run(command: &TokenCommand, context: &Context) -> Outcome {
    let TokenCommand::Create(args) = command;
    let config = TargetConfig::load(&context.dir)?;
    let authority = authority(&context.dir)?;
    let token = new_token(&context.dir, &config, &authority, args.ttl, args.reusable, context)?;
    let document = serde_json::json!({"token": token, "ttl_seconds": args.ttl.as_secs_f64()});
    context.output.answer("Token", &document, &token);
    let uses = if args.reusable { "any number of uses" } else { "one use" };
    context.output.note(&format!("{uses}, {}", show_seconds(args.ttl.as_secs_f64())));
    context.output.next("standfast join TOKEN --dir DIR, on the machine to protect");
    Ok(())
}

fn authority(dir: &Path) -> Outcome<Authority> {
    Authority::load(&RealFiles, &dir.join("pki")).map_err(|e| identity_failure(&e))
}

/// Makes a token; its record is durable.
pub fn new_token(
    dir: &Path,
    config: &TargetConfig,
    authority: &Authority,
    ttl: Duration,
    reusable: bool,
    context: &Context,
) -> Outcome<String> {
    let order = TokenOrder {
        ca_sha256: authority.ca_sha256().to_owned(),
        addrs: vec![config.advertise.clone()],
        role: Role::Agent,
        ttl_seconds: ttl.as_secs(),
        reusable,
    };
    let random = ring::rand::SystemRandom::new();
    let token = Tokens::new(&dir.join("tokens"))
        .create(&RealFiles, &random, &order, context.clock.wall_us())
        .map_err(|e| Failure::new(Exit::Failed, "cannot make a token").why(e.to_string()))?;
    Ok(token.encode())
}

/// What can be done with certificates.
#[derive(Debug, Subcommand)]
pub enum CertCommand {
    /// Issue a client certificate for access to points over nbds.
    Issue(IssueArgs),
}

/// Arguments of `cert issue`.
#[derive(Debug, Args)]
pub struct IssueArgs {
    /// Who it is for.
    pub name: String,
    /// Folder for ca-cert.pem, client-cert.pem and client-key.pem (the names that NBD clients expect).
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// `cert issue`.
pub fn issue(command: &CertCommand, context: &Context) -> Outcome {
    let CertCommand::Issue(args) = command;
    TargetConfig::load(&context.dir)?;
    let issued = authority(&context.dir)?
        .issue(&args.name, Role::Viewer, context.clock.wall_us())
        .map_err(|e| identity_failure(&e))?;
    daemon::private_dir(&args.out)?;
    let mut files = Vec::new();
    for (name, text) in [
        ("ca-cert.pem", &issued.ca_pem),
        ("client-cert.pem", &issued.cert_pem),
        ("client-key.pem", &issued.key_pem),
    ] {
        let path = args.out.join(name);
        write_new(&path, text)?;
        files.push(path);
    }
    let text: String = files.iter().map(|f| format!("{}\n", f.display())).collect();
    context.output.answer("Certificate", &serde_json::json!({"files": files}), &text);
    context.output.next(&format!(
        "nbdinfo 'nbds://HOST:PORT/GROUP.DISK@latest?tls-certificates={}'",
        args.out.display()
    ));
    Ok(())
}

fn write_new(path: &Path, text: &str) -> Outcome {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let what = format!("cannot write {}", path.display());
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    let mut file = file.failed(what.clone())?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).failed(what)
}

/// Arguments of `join`.
#[derive(Debug, Args)]
pub struct JoinArgs {
    /// The token, as printed at the target; `-` reads it from stdin.
    #[arg(required_unless_present = "token_file", conflicts_with = "token_file")]
    pub token: Option<String>,
    /// A file that holds the token; `-` is stdin.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

/// `join`.
pub fn join(args: &JoinArgs, context: &Context) -> Outcome {
    let token = token_text(args)?;
    daemon::private_dir(&context.dir)?;
    let config = remote::join(&context.dir, &token, &context.clock)?;
    let target = config.targets.join(", ");
    let document = serde_json::json!({"agent": config.agent, "target": target});
    let text = format!("joined {target} as {}; the authority is the token's", config.agent);
    context.output.answer("Join", &document, &text);
    context.output.next(&format!("standfast agent run --dir {}", context.dir.display()));
    Ok(())
}

/// The token's text, wherever it is.
pub fn token_text(args: &JoinArgs) -> Outcome<String> {
    let stdin = Path::new("-");
    let path = match (&args.token, &args.token_file) {
        (Some(token), _) if token != "-" => return Ok(token.clone()),
        (Some(_), _) | (None, None) => stdin,
        (None, Some(path)) => path,
    };
    let mut text = String::new();
    let read =
        |source: &mut dyn Read, text: &mut String| source.take(64 << 10).read_to_string(text);
    if path == stdin {
        read(&mut std::io::stdin().lock(), &mut text).failed("cannot read the token from stdin")?;
    } else {
        let what = format!("cannot read {}", path.display());
        let mut file = std::fs::File::open(path).failed(what.clone())?;
        read(&mut file, &mut text).failed(what)?;
    }
    Ok(text.trim().to_owned())
}

/// How long the token of a new target can be used; as `token create` without `--ttl`.
pub const TOKEN_LIFE: Duration = Duration::from_secs(3_600);
