//! `agent run --nbd`: all protected disks over NBD on TCP, through one port.
//!
//! Each connection is a client of its group's filter socket, so requests,
//! flushes and their guarantees pass through unchanged, and a filter that is
//! started again is waited for. Without certificates only
//! addresses of this machine are served; with them STARTTLS is required of all. A gateway is on the
//! data path of its own clients only; it goes when the agent goes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use blockfilter::block::{Errno, Export, ExportInfo, Extent, ZeroFlags};
use blockfilter::config::GroupPaths;
use blockfilter::engine::Clock;
use blockfilter::nbd::client::{Client, ClientConfig};
use blockfilter::nbd::handshake::OpenError;
use blockfilter::nbd::listen::{Address, Listener};
use blockfilter::nbd::server::{Exports, Peer, ServerHandle};

use super::agent::{group_names, load_config};
use super::target::is_loopback;
use crate::cli::disk::parse_disk;
use crate::errors::{Exit, Failure, IoContext, Outcome};

/// Starts serving on `address`, which must be of this machine unless there is TLS.
pub fn serve(
    dir: &Path,
    address: &str,
    tls: Option<&Path>,
    clock: Arc<dyn Clock>,
) -> Outcome<ServerHandle> {
    if tls.is_none() && !is_loopback(address) {
        return Err(Failure::coded(
            Exit::NotAuthorised,
            4,
            format!("disks are not served on {address}"),
        )
        .why("beyond this machine NBD needs TLS, and no certificate was named")
        .hint("name a folder of certificates with --tls, or listen on 127.0.0.1"));
    }
    let listener = Listener::bind(&Address::Tcp(address.to_owned())).map_err(|error| {
        Failure::coded(Exit::Busy, 5, "cannot serve NBD")
            .why(error.to_string())
            .hint("choose another address with --nbd")
    })?;
    let exports = Arc::new(DiskExports { dir: dir.to_owned(), clock: clock.clone() });
    ServerHandle::start(vec![listener], super::nbd_server(tls)?, exports, clock)
        .failed("cannot serve NBD")
}

#[derive(Debug)]
struct DiskExports {
    dir: PathBuf,
    clock: Arc<dyn Clock>,
}

impl Exports for DiskExports {
    fn list(&self, _peer: &Peer) -> Vec<String> {
        let configs = group_names(&self.dir).into_iter();
        let configs = configs.filter_map(|name| load_config(&self.dir, &name).ok());
        configs
            .flat_map(|(config, _)| {
                config.disks.iter().map(|d| config.export(&d.disk)).collect::<Vec<_>>()
            })
            .collect()
    }

    fn open(&self, name: &str, _peer: &Peer) -> Result<Arc<dyn Export>, OpenError> {
        let unknown = || OpenError::Unknown(name.to_owned());
        let (group, _) = parse_disk(name).map_err(|_| unknown())?;
        let paths = GroupPaths::new(&self.dir, &group);
        if !paths.config().exists() {
            return Err(unknown());
        }
        let config = ClientConfig::new(Address::Unix(paths.nbd_socket()), name);
        let config = ClientConfig { connect_timeout: CONNECT, ..config };
        let client = Client::connect(config, self.clock.clone()).map_err(|error| {
            tracing::warn!(name, %error, "a disk was not opened");
            unknown()
        })?;
        Ok(Arc::new(Remote { client, name: name.to_owned() }))
    }
}

/// A disk of a filter, by its NBD socket.
#[derive(Debug)]
struct Remote {
    client: Client,
    name: String,
}

impl Export for Remote {
    fn info(&self) -> ExportInfo {
        let info = self.client.info();
        ExportInfo {
            size: info.size,
            read_only: info.read_only(),
            // Flushes reach the filter, which covers all connections.
            multi_conn: true,
            block_min: info.block_min,
            block_preferred: info.block_preferred,
            fast_zero: true,
            trim: true,
            dirty_map: false,
            description: format!("protected disk {}", self.name),
        }
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Errno> {
        self.client.read(offset, buf)
    }

    fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), Errno> {
        self.client.write(offset, data, fua)
    }

    fn zero(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), Errno> {
        self.client.zero(offset, len, flags)
    }

    fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), Errno> {
        self.client.trim(offset, len, fua)
    }

    fn flush(&self) -> Result<(), Errno> {
        self.client.flush()
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> Result<Vec<Extent>, Errno> {
        let mut extents = self.client.extents(offset, len)?;
        extents.truncate(max.max(1));
        Ok(extents)
    }
}

const CONNECT: Duration = Duration::from_secs(5);
