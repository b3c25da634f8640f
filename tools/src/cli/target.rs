//! `target init` and `target run`, `forget`.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blockfilter::engine::real::RealFiles;
use blockfilter::names::Name;
use blockfilter::nbd::listen::Address;
use clap::{Args, Subcommand};
use replicator::identity::{Authority, IdentityError};
use target::store::{Store, StoreError};

use super::token::{TOKEN_LIFE, new_token};
use super::{Context, parse_address};
use crate::daemon::control::{TargetRequest, ask_daemon};
use crate::daemon::target::{TargetConfig, identity_failure, store_failure};
use crate::daemon::{self, target as daemon_target};
use crate::errors::{Exit, Failure, IoContext, Outcome};

/// What can be done with the target.
#[derive(Debug, Subcommand)]
pub enum TargetCommand {
    /// Make the store, the certificate authority and a join token.
    Init(InitArgs),
    /// Run the target server in the foreground.
    Run,
}

/// Arguments of `target init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// Where agents connect to.
    #[arg(long, default_value = "0.0.0.0:7788", value_name = "ADDR:PORT", value_parser = parse_address)]
    pub listen: String,
    /// The address that agents are told, if not the one listened on.
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_address)]
    pub advertise: Option<String>,
    /// Serve points and drills over NBD there too; beyond this machine clients need a certificate.
    #[arg(long, value_name = "ADDR:PORT|unix:PATH")]
    pub nbd: Option<Address>,
}

/// Runs the command.
pub fn run(command: &TargetCommand, context: &Context) -> Outcome {
    match command {
        TargetCommand::Init(args) => init(args, context),
        TargetCommand::Run => {
            daemon::tunables::apply();
            daemon_target::run(&context.dir, context.clock.clone(), context.output)
        }
    }
}

fn init(args: &InitArgs, context: &Context) -> Outcome {
    let dir = &context.dir;
    if dir.join("target.json").exists() {
        return Err(store_failure(&StoreError::Exists(dir.clone())));
    }
    let occupied = std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some());
    if occupied && !dir.join("pki").exists() {
        return Err(Failure::coded(Exit::Busy, 8, format!("{} is not empty", dir.display()))
            .hint("give a folder of its own with --dir"));
    }
    daemon::private_dir(dir)?;
    let listen = free_port(&args.listen)?;
    let advertise = args.advertise.clone().unwrap_or_else(|| reachable(&listen));
    let host = |address: &str| {
        let host = address.rsplit_once(':').map_or(address, |(h, _)| h);
        host.trim_matches(['[', ']']).to_owned()
    };
    let mut hosts = vec![host(&advertise), host(&listen)];
    hosts.retain(|h| h != "0.0.0.0" && h != "::");
    hosts.dedup();
    let wall_us = context.clock.wall_us();
    // Each step can be repeated; `target.json` comes last and says that all is there.
    let authority = match Authority::create(&RealFiles, &dir.join("pki"), &hosts, wall_us) {
        Err(IdentityError::Exists(_)) => Authority::load(&RealFiles, &dir.join("pki")),
        other => other,
    }
    .map_err(|e| identity_failure(&e))?;
    match Store::create(Arc::new(RealFiles), dir, context.clock.clone()) {
        Ok(_) | Err(StoreError::Exists(_)) => {}
        Err(error) => return Err(store_failure(&error)),
    }
    let config = TargetConfig {
        version: 1,
        listen: listen.clone(),
        advertise,
        nbd: args.nbd.as_ref().map(ToString::to_string),
    };
    config.store(dir)?;
    let token = new_token(dir, &config, &authority, TOKEN_LIFE, false, context)?;
    let document = serde_json::json!({
        "token": token, "ca_sha256": authority.ca_sha256(), "listen": listen,
        "advertise": config.advertise,
    });
    let text = format!(
        "store      {}\nlisten     {listen}\nadvertise  {}\nCA sha256  {}\ntoken      {token}\n           (one use, 1 hour)",
        dir.display(),
        config.advertise,
        authority.ca_sha256(),
    );
    context.output.answer("TargetInit", &document, &text);
    context.output.next(&format!(
        "standfast target run --dir {}; then, on the machine to protect: standfast join TOKEN",
        dir.display()
    ));
    Ok(())
}

/// Port 0 becomes a free one, once and for all: tokens carry it.
fn free_port(listen: &str) -> Outcome<String> {
    let Some(host) = listen.strip_suffix(":0") else { return Ok(listen.to_owned()) };
    let what = format!("cannot listen on {listen}");
    let socket = std::net::TcpListener::bind(listen).failed(what.clone())?;
    let port = socket.local_addr().failed(what)?.port();
    Ok(format!("{host}:{port}"))
}

/// What others can connect to: this machine's name instead of "any address".
fn reachable(listen: &str) -> String {
    let (host, port) = listen.rsplit_once(':').unwrap_or((listen, "7788"));
    if host != "0.0.0.0" && host != "[::]" {
        return listen.to_owned();
    }
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("{name}:{port}")
}

/// Arguments of `forget`.
#[derive(Debug, Args)]
pub struct ForgetArgs {
    /// The group.
    pub group: Name,
    /// The group's name again: its history is deleted.
    #[arg(long, value_name = "GROUP")]
    pub confirm: Option<String>,
}

/// `forget`: deletes a group's history at the target.
pub fn forget(args: &ForgetArgs, context: &Context) -> Outcome {
    confirm(args, context)?;
    let request = TargetRequest::Forget { group: args.group.clone() };
    ask_daemon("target", &context.dir, &request, Duration::from_secs(120))?;
    let text = format!("group {} and its history are deleted", args.group);
    context.output.answer("Forget", &serde_json::json!({"group": args.group}), &text);
    context.output.next(&format!("standfast status --dir {}", context.dir.display()));
    Ok(())
}

fn confirm(args: &ForgetArgs, context: &Context) -> Outcome {
    use std::io::{BufRead, IsTerminal};
    let group = args.group.as_str();
    let what = format!("deleting the history of group {group} needs a confirmation");
    let given = match &args.confirm {
        Some(given) => given.clone(),
        None if context.no_input || context.output.json || !std::io::stdin().is_terminal() => {
            return Err(Failure::coded(Exit::Confirm, 1, what).hint(format!("--confirm {group}")));
        }
        None => {
            eprint!("all points of {group} will be deleted; type its name to go on: ");
            let mut line = String::new();
            std::io::stdin().lock().read_line(&mut line).failed("cannot read the answer")?;
            line.trim().to_owned()
        }
    };
    if given == group {
        return Ok(());
    }
    Err(Failure::coded(Exit::Confirm, 2, what)
        .why(format!("{given:?} is not {group:?}"))
        .hint(format!("--confirm {group}")))
}

/// The target's configuration, or a failure that says how to make one.
pub fn config(dir: &Path) -> Outcome<TargetConfig> {
    TargetConfig::load(dir)
}
