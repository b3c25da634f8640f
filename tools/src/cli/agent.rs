//! `agent run`: the source daemon, in the foreground.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Context, parse_address};
use crate::daemon::{self, agent};
use crate::errors::Outcome;

/// What can be done with the agent.
#[derive(Debug, Subcommand)]
pub enum AgentCommand {
    /// Run the source daemon in the foreground; it adopts filters that still run.
    ///
    /// Stopping it (SIGTERM) leaves the disks served and replicated: `unprotect`
    /// is what stops a group.
    Run(RunArgs),
}

/// Arguments of `agent run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Serve all protected disks over NBD on TCP too (TLS is needed beyond this machine).
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_address)]
    pub nbd: Option<String>,
    /// STARTTLS on that port, required, with the ca-cert.pem, server-cert.pem and
    /// server-key.pem of this folder; clients must show a certificate of that authority.
    #[arg(long, value_name = "DIR", requires = "nbd")]
    pub tls: Option<PathBuf>,
}

/// Runs the command.
pub fn run(command: &AgentCommand, context: &Context) -> Outcome {
    let AgentCommand::Run(args) = command;
    daemon::state_dir(&context.dir, "standfast join TOKEN --dir DIR")?;
    let nbd = args.nbd.as_deref().map(|address| (address, args.tls.as_deref()));
    agent::run(&context.dir, nbd, context.clock.clone(), context.output)
}
