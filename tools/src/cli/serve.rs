//! `serve`: a plain NBD export of a file, with no journal and no protection.
//!
//! Takes its sockets from systemd (LISTEN_FDS) if it is given some, so that other
//! people's NBD tests can drive it; else `--nbd`, else loopback's NBD port.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use blockfilter::nbd::file::{FileError, FileExport};
use blockfilter::nbd::listen::{Address, Listener, inherited};
use blockfilter::nbd::server::{FixedExports, ServerHandle};
use clap::Args;

use super::{Context, unix_uri};
use crate::daemon;
use crate::errors::{Exit, Failure, IoContext, Outcome};

/// Arguments of `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// A raw image or block device.
    pub path: PathBuf,
    /// The export's name.
    #[arg(long, default_value = "")]
    pub name: String,
    /// Where to listen; a socket passed by systemd comes before this.
    #[arg(long, value_name = "ADDR:PORT|unix:PATH")]
    pub nbd: Option<Address>,
    /// STARTTLS on TCP with the ca-cert.pem, server-cert.pem and server-key.pem of
    /// this folder; clients must use it and show a certificate of that authority.
    #[arg(long, value_name = "DIR")]
    pub tls: Option<PathBuf>,
    /// Refuse writes, and share the file with other readers.
    #[arg(long)]
    pub read_only: bool,
}

/// Runs until it is told to stop.
pub fn run(args: &ServeArgs, context: &Context) -> Outcome {
    let stop = daemon::stop_flag()?;
    let export = FileExport::open(&args.path, args.read_only).map_err(|e| file_failure(&e))?;
    let mut listeners = Vec::new();
    for fd in inherited() {
        listeners.push(Listener::from_fd(fd).failed("cannot use a socket that was passed")?);
    }
    if listeners.is_empty() || args.nbd.is_some() {
        let address = args.nbd.clone().unwrap_or_else(|| Address::Tcp(NBD_DEFAULT.to_owned()));
        listeners.push(Listener::bind(&address).map_err(|error| {
            Failure::coded(Exit::Busy, 5, "cannot serve NBD")
                .why(error.to_string())
                .hint("choose another address with --nbd")
        })?);
    }
    let exports = Arc::new(FixedExports(vec![(args.name.clone(), Arc::new(export))]));
    let clock = context.clock.clone();
    let config = daemon::nbd_server(args.tls.as_deref())?;
    let mut server =
        ServerHandle::start(listeners, config, exports, clock).failed("cannot serve NBD")?;
    let uri = |address: &Address| match address {
        Address::Unix(path) => unix_uri(&args.name, path),
        Address::Tcp(host) if args.tls.is_some() => format!("nbds://{host}/{}", args.name),
        Address::Tcp(host) => format!("nbd://{host}/{}", args.name),
    };
    let uris: Vec<String> = server.addresses().iter().map(uri).collect();
    context.output.ready(serde_json::json!({
        "role": "serve", "path": args.path, "name": args.name, "uri": uris.first(),
        "uris": uris, "read_only": args.read_only, "pid": std::process::id(),
        "nbd": server.addresses().first().map(ToString::to_string),
    }));
    daemon::notify_ready("serving");
    daemon::run_until(&stop, Duration::from_millis(50), || ());
    daemon::notify_stopping();
    server.stop();
    Ok(())
}

fn file_failure(error: &FileError) -> Failure {
    let exit = match error {
        FileError::Missing(_) => Exit::NotFound,
        FileError::Busy(_) => Exit::Busy,
        FileError::Kind(_) => Exit::WrongState,
        FileError::Io { source, .. } => {
            return Failure::io("cannot serve the file", source).why(error.to_string());
        }
    };
    Failure::coded(exit, 20, "cannot serve the file").why(error.to_string())
}

const NBD_DEFAULT: &str = "127.0.0.1:10809";
