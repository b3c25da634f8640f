//! The command surface: clap structs, one file a noun, and the way from the
//! arguments to an exit code.
//!
//! Owns: parsing, and that every leaf takes `--json` and fails with one
//! [`Failure`]. What a command does is in its file; what daemons do is in
//! [`crate::daemon`]. Help, completions and the test that walks every leaf are
//! made from the same tree ([`command`]).

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use blockfilter::engine::Clock;
use blockfilter::engine::real::RealClock;
use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::errors::{Exit, Failure, Outcome};
use crate::output::Output;

pub mod agent;
pub mod disk;
pub mod drill;
pub mod inspect;
pub mod point;
pub mod protect;
pub mod run;
pub mod serve;
pub mod status;
pub mod sync;
pub mod target;
pub mod token;
pub mod unprotect;
/// Everything on the command line.
#[derive(Debug, Parser)]
#[command(name = "standfast", version, about = ABOUT, max_term_width = 100)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    /// Flags that work everywhere.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags that work on every command, before or after it.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// State directory of the agent or the target: configuration, keys, socket, journal, store.
    #[arg(long, global = true, env = "STANDFAST_DIR", default_value = DIR_DEFAULT, value_name = "DIR")]
    pub dir: PathBuf,
    /// One JSON document on stdout; errors as one JSON line on stderr.
    #[arg(long, global = true)]
    pub json: bool,
    /// Only the answer and errors.
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// More about what is done; twice for everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Never ask; fail with exit code 9 where a confirmation is needed.
    #[arg(long, global = true)]
    pub no_input: bool,
    /// No colours.
    #[arg(long, global = true)]
    pub no_color: bool,
    /// No progress.
    #[arg(long, global = true)]
    pub no_progress: bool,
}

/// The nouns and top-level verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Export a plain file or block device over NBD, without protection.
    Serve(serve::ServeArgs),
    /// The target server.
    #[command(subcommand)]
    Target(target::TargetCommand),
    /// Join tokens (at the target).
    #[command(subcommand)]
    Token(token::TokenCommand),
    /// Certificates (at the target).
    #[command(subcommand)]
    Cert(token::CertCommand),
    /// Enrol this machine at a target, with a token.
    Join(token::JoinArgs),
    /// The source daemon.
    #[command(subcommand)]
    Agent(agent::AgentCommand),
    /// Put disks under protection: serve them over NBD and copy them to the target.
    Protect(protect::ProtectArgs),
    /// Apply everything to the disks and stop serving them; they are plain images again.
    Unprotect(unprotect::UnprotectArgs),
    /// Show the state of every group.
    Status(status::StatusArgs),
    /// Wait until everything acknowledged so far is durable at the target.
    Sync(sync::SyncArgs),
    /// Protected disks.
    #[command(subcommand)]
    Disk(disk::DiskCommand),
    /// Recovery points.
    #[command(subcommand)]
    Point(point::PointCommand),
    /// Test failovers (at the target).
    #[command(subcommand)]
    Drill(drill::DrillCommand),
    /// Delete a group's history (at the target).
    Forget(target::ForgetArgs),
    /// Look into files, read-only, with the production decoders.
    #[command(subcommand)]
    Inspect(inspect::InspectCommand),
    /// The filter process of a group.
    #[command(hide = true)]
    RunFilter(run::GroupArgs),
    /// The replicator process of a group.
    #[command(hide = true)]
    RunReplicator(run::GroupArgs),
    /// A FUSE process.
    #[command(hide = true)]
    RunFuse(run::FuseArgs),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// What every command gets.
#[derive(Debug, Clone)]
pub struct Context {
    /// How to talk.
    pub output: Output,
    /// The state directory, absolute.
    pub dir: PathBuf,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Never ask.
    pub no_input: bool,
    /// `-v` count.
    pub verbose: u8,
}

/// Parses, runs, prints; the process's exit code.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let json = arguments.iter().skip(1).take_while(|a| *a != "--").any(|a| a == "--json");
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => return usage(&error, json),
    };
    let global = &cli.global;
    let output = Output { json: global.json, quiet: global.quiet, no_progress: global.no_progress };
    let hidden = matches!(
        cli.command,
        Command::RunFilter(_) | Command::RunReplicator(_) | Command::RunFuse(_)
    );
    let outcome = std::path::absolute(&global.dir)
        .map_err(|e| Failure::io(format!("cannot use {}", global.dir.display()), &e))
        .and_then(|dir| {
            let clock = Arc::new(RealClock::new());
            let context =
                Context { output, dir, clock, no_input: global.no_input, verbose: global.verbose };
            start_log(&context, global.no_color);
            run(cli.command, &context)
        });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if hidden && !output.json {
                // The last line of the log is what `status` and the agent show.
                tracing::error!(code = failure.code, "{failure}");
            } else {
                output.failure(&failure);
            }
            ExitCode::from(failure.exit as u8)
        }
    }
}

fn run(command: Command, context: &Context) -> Outcome {
    match command {
        Command::Serve(args) => serve::run(&args, context),
        Command::Target(command) => target::run(&command, context),
        Command::Token(command) => token::run(&command, context),
        Command::Cert(command) => token::issue(&command, context),
        Command::Join(args) => token::join(&args, context),
        Command::Point(command) => point::run(&command, context),
        Command::Drill(command) => drill::run(&command, context),
        Command::Forget(args) => target::forget(&args, context),
        Command::Inspect(command) => inspect::run(&command, context),
        Command::Agent(command) => agent::run(&command, context),
        Command::Protect(args) => protect::run(&args, context),
        Command::Unprotect(args) => unprotect::run(&args, context),
        Command::Status(args) => status::run(&args, context),
        Command::Sync(args) => sync::run(&args, context),
        Command::Disk(command) => disk::run(&command, context),
        Command::RunFilter(args) => run::filter(&args, context),
        Command::RunReplicator(args) => run::replicator(&args, context),
        Command::RunFuse(args) => run::fuse(&args, context),
        Command::Completions { shell } => completions(shell, context),
    }
}

/// The clap tree, for completions and tests.
pub fn command() -> clap::Command {
    Cli::command()
}

/// A wrong command line that clap cannot see.
pub fn usage_failure(what: impl Into<String>) -> Failure {
    Failure::coded(Exit::Usage, 2, what).hint("standfast --help, or --help behind the command")
}

/// Help and version are answers; anything else is a usage error, exit code 2.
fn usage(error: &clap::Error, json: bool) -> ExitCode {
    use clap::error::ErrorKind;
    let helpful = matches!(
        error.kind(),
        ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    );
    if json && (!helpful || error.use_stderr()) {
        let text = error.to_string();
        let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
        let what = lines.next().unwrap_or("wrong usage").trim_start_matches("error: ");
        let failure = Failure::coded(Exit::Usage, 1, what)
            .hint("standfast --help, or --help behind the command");
        Output { json, ..Output::default() }.failure(&failure);
        return ExitCode::from(Exit::Usage as u8);
    }
    let _ = error.print();
    ExitCode::from(if error.use_stderr() { Exit::Usage as u8 } else { 0 })
}

fn completions(shell: clap_complete::Shell, context: &Context) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "standfast", &mut script);
    let script = String::from_utf8_lossy(&script);
    let document = serde_json::json!({"shell": shell.to_string(), "script": script});
    context.output.answer("Completions", &document, &script);
    Ok(())
}

/// Logs go to stderr: warnings, with `-v` information, with `-vv` everything.
fn start_log(context: &Context, no_color: bool) {
    use std::io::IsTerminal;
    let level = match context.verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("STANDFAST_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    let plain = no_color || std::env::var_os("NO_COLOR").is_some();
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(!plain && std::io::stderr().is_terminal())
        .log_internal_errors(false)
        .try_init();
}

/// Checks `HOST:PORT` and returns it; the host may be a name.
pub fn parse_address(text: &str) -> Result<String, String> {
    let (host, port) = text.rsplit_once(':').ok_or("write ADDRESS:PORT")?;
    if host.is_empty() || port.parse::<u16>().is_err() {
        return Err("write ADDRESS:PORT, such as 127.0.0.1:10809".into());
    }
    Ok(text.to_owned())
}

/// `nbd+unix:///EXPORT?socket=PATH`, with the path percent-encoded where needed.
pub fn unix_uri(export: &str, socket: &Path) -> String {
    let mut path = String::new();
    for byte in socket.as_os_str().as_encoded_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' | b'~' => {
                path.push(char::from(*byte));
            }
            other => path.push_str(&format!("%{other:02X}")),
        }
    }
    format!("nbd+unix:///{export}?socket={path}")
}

const ABOUT: &str = "Continuous replication and disaster recovery for Linux disks";
const DIR_DEFAULT: &str = "/var/lib/standfast";
