//! The target: the store, the replication server, and the NBD server of points
//! and drills, in one process.
//!
//! Owns the store's lock (in the store), the control socket, and the thread
//! that does the store's background work. Points are always served on
//! `DIR/nbd.sock`, and on TCP if `target init --nbd` said so: beyond this
//! machine only to clients with a certificate of the authority's. It may be
//! killed at any time: what was acknowledged is durable.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockfilter::block::Export;
use blockfilter::config::short_socket;
use blockfilter::engine::real::RealFiles;
use blockfilter::engine::{Clock, Files, read_file, replace_file};
use blockfilter::names::Name;
use blockfilter::nbd::handshake::OpenError;
use blockfilter::nbd::listen::{Address, Listener};
use blockfilter::nbd::server::{Exports, Peer, ServerConfig, ServerHandle};
use replicator::identity::{Role, peer_of, server_tls};
use serde::{Deserialize, Serialize};
use target::export::{list_exports, open_export};
use target::points::{PointQuery, PointSpec};
use target::store::{GroupStore, Store, StoreError};

use super::control::{self, Reply, Resolved, TargetRequest};
use super::replica;
use super::status::{ProcessStatus, Status, rfc3339};
use crate::errors::{Exit, Failure, IoContext, Outcome};
use crate::output::Output;

/// `DIR/target.json`, made by `target init`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetConfig {
    /// Version of this file, 1.
    pub version: u32,
    /// Where agents connect to.
    pub listen: String,
    /// What tokens tell agents.
    pub advertise: String,
    /// NBD on TCP or another Unix socket besides `DIR/nbd.sock`.
    pub nbd: Option<String>,
}

impl TargetConfig {
    /// Reads it.
    pub fn load(dir: &Path) -> Outcome<Self> {
        let path = Self::path(dir);
        if !path.exists() {
            let what = format!("{} is not a target's state directory", dir.display());
            return Err(Failure::coded(Exit::NotFound, 4, what)
                .hint(format!("standfast target init --dir {}", dir.display())));
        }
        let what = format!("cannot read {}", path.display());
        let text = read_file(&RealFiles, &path, 1 << 20).failed(what.clone())?;
        let config: Self = serde_json::from_slice(&text)
            .map_err(|e| Failure::coded(Exit::WrongState, 3, what.clone()).why(e.to_string()))?;
        if config.version != 1 {
            return Err(Failure::coded(Exit::WrongState, 4, what)
                .why(format!("it has version {}, this program knows 1", config.version))
                .hint("use a newer standfast"));
        }
        Ok(config)
    }

    /// Writes it, durably: the last step of `target init`.
    pub fn store(&self, dir: &Path) -> Outcome {
        let path = Self::path(dir);
        let text = serde_json::to_vec_pretty(self).unwrap_or_default();
        replace_file(&RealFiles, &path, &text).failed(format!("cannot write {}", path.display()))
    }

    fn path(dir: &Path) -> PathBuf {
        dir.join("target.json")
    }
}

/// The socket on which points and drills are served.
pub fn nbd_socket(dir: &Path) -> PathBuf {
    short_socket(dir.join("nbd.sock"))
}

/// A running target.
#[derive(Debug)]
pub struct Target {
    dir: PathBuf,
    config: TargetConfig,
    store: Arc<Store>,
    replication: target::server::TargetHandle,
    nbd: Vec<String>,
    clock: Arc<dyn Clock>,
}

/// Runs the target until it is told to stop.
pub fn run(dir: &Path, clock: Arc<dyn Clock>, output: Output) -> Outcome {
    let stop = super::stop_flag()?;
    let config = TargetConfig::load(dir)?;
    let files: Arc<dyn Files> = Arc::new(RealFiles);
    let store = Store::open(files, dir, clock.clone()).map_err(|e| store_failure(&e))?;
    let store = Arc::new(store);
    let replication = replica::serve(dir, &config, store.clone(), clock.clone())?;
    let mut nbd = serve_nbd(dir, &config, store.clone(), clock.clone())?;
    let target = Arc::new(Target {
        dir: dir.to_owned(),
        nbd: nbd.addresses().iter().map(ToString::to_string).collect(),
        config,
        store: store.clone(),
        replication,
        clock,
    });
    let socket = control::socket_in(dir);
    let answering = target.clone();
    control::serve(&socket, stop.clone(), move |request| answering.answer(request))
        .failed(format!("cannot listen on {}", socket.display()))?;
    let maintained = store;
    let stopping = stop.clone();
    std::thread::Builder::new()
        .name("maintain".into())
        .spawn(move || maintain(&maintained, &stopping))
        .failed("cannot start a thread")?;
    output.ready(serde_json::json!({
        "role": "target", "listen": target.replication.local_addr().to_string(), "nbd": target.nbd,
        "control": socket, "pid": std::process::id(),
    }));
    super::notify_ready(&format!("listening on {}", target.config.listen));
    super::run_until(&stop, Duration::from_millis(100), || ());
    super::notify_stopping();
    nbd.stop();
    target.replication.stop();
    let _ = std::fs::remove_file(&socket);
    Ok(())
}

/// Background work of the store; a failure is the store's to remember.
fn maintain(store: &Store, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        match store.maintain() {
            Ok(true) => continue,
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "the store's background work failed"),
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn serve_nbd(
    dir: &Path,
    config: &TargetConfig,
    store: Arc<Store>,
    clock: Arc<dyn Clock>,
) -> Outcome<ServerHandle> {
    let bind = |address: &Address| {
        Listener::bind(address).map_err(|e| {
            Failure::coded(Exit::Busy, 5, "cannot serve NBD")
                .why(e.to_string())
                .hint("stop what listens there, or init the target with another --nbd")
        })
    };
    let socket = nbd_socket(dir);
    // The store's lock is ours, so a socket that is there is left over.
    let _ = std::fs::remove_file(&socket);
    let mut listeners = vec![bind(&Address::Unix(socket))?];
    let mut server = ServerConfig::default();
    if let Some(text) = &config.nbd {
        let address: Address =
            text.parse().map_err(|e| Failure::new(Exit::WrongState, format!("{e}")))?;
        if let Address::Tcp(host) = &address {
            let tls = server_tls(&RealFiles, &dir.join("pki"), false);
            server.tls = Some(tls.map_err(|e| identity_failure(&e))?);
            server.tls_required = !is_loopback(host);
        }
        listeners.push(bind(&address)?);
    }
    let exports = Arc::new(StoreExports { store });
    ServerHandle::start(listeners, server, exports, clock).failed("cannot serve NBD")
}

/// Whether `HOST:PORT` can only be reached from this machine.
pub fn is_loopback(address: &str) -> bool {
    use std::net::ToSocketAddrs;
    address.to_socket_addrs().is_ok_and(|found| found.into_iter().all(|a| a.ip().is_loopback()))
}

/// Points and drills as NBD exports: all for local and viewing clients, its own
/// groups for an agent.
#[derive(Debug)]
struct StoreExports {
    store: Arc<Store>,
}

impl StoreExports {
    fn may(&self, name: &str, peer: &Peer) -> bool {
        if peer.certificates.is_empty() {
            // Over TCP beyond this machine the server has demanded TLS already.
            return true;
        }
        let Ok(who) = peer_of(&peer.certificates) else { return false };
        let owns = |group: &str| {
            group
                .parse::<Name>()
                .ok()
                .and_then(|g| self.store.group(&g))
                .is_some_and(|g| g.state().meta.owner == who.name)
        };
        match who.role {
            Role::Viewer => true,
            Role::Agent => name.split_once('.').is_some_and(|(group, _)| owns(group)),
            Role::Target => false,
        }
    }
}

impl Exports for StoreExports {
    fn list(&self, peer: &Peer) -> Vec<String> {
        list_exports(&self.store).into_iter().filter(|name| self.may(name, peer)).collect()
    }

    fn open(&self, name: &str, peer: &Peer) -> Result<Arc<dyn Export>, OpenError> {
        if !self.may(name, peer) {
            return Err(OpenError::Unknown(name.to_owned()));
        }
        open_export(&self.store, name).map_err(|error| {
            tracing::info!(name, %error, "an export was not opened");
            OpenError::Unknown(format!("{name}: {error}"))
        })
    }
}

impl Target {
    fn answer(&self, request: TargetRequest) -> Reply {
        let result = match request {
            TargetRequest::Ping => Ok(Reply::pong()),
            TargetRequest::Status { group } => self.status(group.as_ref()),
            TargetRequest::Points { group, since, tagged, limit } => {
                self.points(&group, since.as_deref(), tagged, limit)
            }
            TargetRequest::Resolve { group, disk, point } => {
                self.resolve(&group, disk.as_ref(), &point)
            }
            TargetRequest::DrillStart { group, point } => self.start_drill(&group, &point),
            TargetRequest::DrillList => Ok(self.drills()),
            TargetRequest::DrillFinish { drill } => self.finish_drill(&drill),
            TargetRequest::Forget { group } => self.forget(&group),
        };
        result.into()
    }

    fn group(&self, group: &Name) -> Outcome<Arc<GroupStore>> {
        self.store.group(group).ok_or_else(|| {
            Failure::coded(Exit::NotFound, 5, format!("the target holds no group {group}"))
                .hint(format!("standfast status --dir {}", self.dir.display()))
        })
    }

    fn status(&self, wanted: Option<&Name>) -> Result<Reply, Failure> {
        if let Some(group) = wanted {
            self.group(group)?;
        }
        let sessions = self.replication.status();
        let groups = self.store.groups();
        let groups = groups.iter().filter(|(name, _)| wanted.is_none_or(|w| w == name));
        let process = ProcessStatus {
            role: "target".into(),
            pid: Some(std::process::id()),
            ..ProcessStatus::default()
        };
        let mut processes = vec![process];
        processes.extend(super::mounts::processes(&self.dir));
        Ok(Reply::document(&Status {
            schema: "standfast/v1/Status".into(),
            role: "target".into(),
            groups: groups
                .map(|(name, group)| replica::group_status(&self.dir, name, group, &sessions))
                .collect(),
            processes,
            io_engine: Some("blocking (the store needs no other)".into()),
            control_socket: Some(control::socket_in(&self.dir).display().to_string()),
            nbd: self.nbd.clone(),
        }))
    }

    fn points(
        &self,
        group: &Name,
        since: Option<&str>,
        tagged: bool,
        limit: usize,
    ) -> Result<Reply, Failure> {
        let group = self.group(group)?;
        let since_us = since.map(|text| self.since(text)).transpose()?;
        let query = PointQuery { since_us, tagged, limit: Some(limit) };
        let points: Vec<_> = group
            .points(query)
            .iter()
            .map(|p| {
                serde_json::json!({
                    "id": p.id(), "lsn": p.lsn, "time": rfc3339(p.time_us),
                    "kind": p.kind.as_str(), "tag": p.tag, "usable": p.usable,
                })
            })
            .collect();
        Ok(Reply::document(&serde_json::json!({
            "points": points, "count": group.point_count(),
            "oldest": group.oldest().map(|p| rfc3339(p.time_us)),
            "newest": group.newest().map(|p| rfc3339(p.time_us)),
        })))
    }

    /// A time as written by the user; relative ones count from now.
    fn since(&self, text: &str) -> Outcome<u64> {
        match parse_point(text)? {
            PointSpec::At(us) => Ok(us),
            PointSpec::Ago(us) => Ok(self.clock.wall_us().saturating_sub(us)),
            _ => {
                Err(crate::cli::usage_failure("--since takes an RFC 3339 time or a span like -15m"))
            }
        }
    }

    fn resolve(&self, name: &Name, disk: Option<&Name>, point: &str) -> Result<Reply, Failure> {
        let group = self.group(name)?;
        let mut disks: Vec<Name> = group.state().meta.disks.into_iter().map(|d| d.disk).collect();
        if let Some(disk) = disk {
            if !disks.contains(disk) {
                let error = StoreError::NoDisk(name.clone(), disk.to_string());
                return Err(store_failure(&error));
            }
            disks = vec![disk.clone()];
        }
        let point = group
            .resolve(&parse_point(point)?)
            .map_err(|e| store_failure(&StoreError::Point(e)))?;
        Ok(Reply::document(&Resolved { point: point.id(), disks }))
    }

    fn start_drill(&self, name: &Name, point: &str) -> Result<Reply, Failure> {
        let group = self.group(name)?;
        let point = group
            .resolve(&parse_point(point)?)
            .map_err(|e| store_failure(&StoreError::Point(e)))?;
        let drill = self.store.start_drill(name, &point).map_err(|e| store_failure(&e))?;
        Ok(Reply::document(&self.drill_document(&drill)))
    }

    fn drill_document(&self, drill: &target::store::Drill) -> serde_json::Value {
        let disks = self.store.group(&drill.group).map(|g| g.state().meta.disks);
        let socket = nbd_socket(&self.dir);
        let disks: Vec<_> = disks
            .unwrap_or_default()
            .iter()
            .map(|d| {
                let export = format!("drill.{}.{}", drill.id, d.disk);
                let uri = crate::cli::unix_uri(&export, &socket);
                let file = super::mounts::file_of(&self.dir, &export);
                serde_json::json!({"disk": d.disk, "uri": uri, "export": export, "file": file})
            })
            .collect();
        serde_json::json!({
            "drill": drill.id, "group": drill.group, "point": drill.point.id(),
            "time": rfc3339(drill.point.time_us), "created": rfc3339(drill.created_us),
            "disks": disks,
        })
    }

    fn drills(&self) -> Reply {
        let drills: Vec<_> = self.store.drills().iter().map(|d| self.drill_document(d)).collect();
        Reply::document(&serde_json::json!({"drills": drills}))
    }

    fn finish_drill(&self, id: &str) -> Result<Reply, Failure> {
        let missing = || store_failure(&StoreError::NoDrill(id.to_owned()));
        let id: Name = id.parse().map_err(|_| missing())?;
        self.store.finish_drill(&id).map_err(|e| store_failure(&e))?;
        Ok(Reply::Done)
    }

    fn forget(&self, group: &Name) -> Result<Reply, Failure> {
        self.group(group)?;
        self.replication.disconnect(group);
        self.store.forget(group).map_err(|e| store_failure(&e))?;
        Ok(Reply::Done)
    }
}

fn parse_point(text: &str) -> Outcome<PointSpec> {
    text.parse::<PointSpec>().map_err(|e| crate::cli::usage_failure(e.to_string()))
}

/// An error of the store as a failure of a command.
pub fn store_failure(error: &StoreError) -> Failure {
    use target::points::PointError;
    let coded = |exit, number| Failure::coded(exit, number, error.to_string());
    match error {
        StoreError::Busy(_) => coded(Exit::Busy, 6).hint("is another target running there?"),
        StoreError::Missing(_) => coded(Exit::NotFound, 6).hint("standfast target init --dir DIR"),
        StoreError::Exists(_) => coded(Exit::Busy, 7).hint("choose another --dir"),
        StoreError::Newer { .. } => coded(Exit::WrongState, 5).hint("use a newer standfast"),
        StoreError::Damaged { .. } => coded(Exit::WrongState, 6)
            .hint("nothing was changed; restore the file, or forget the group and seed it again"),
        StoreError::GroupExists(_) => coded(Exit::WrongState, 7).hint("choose another name"),
        StoreError::NoGroup(_) | StoreError::NoDisk(..) | StoreError::NoDrill(_) => {
            coded(Exit::NotFound, 7).hint("standfast status --dir DIR")
        }
        StoreError::Invalid(_) => coded(Exit::WrongState, 8),
        StoreError::Point(PointError::Missing(_)) => {
            coded(Exit::NotFound, 8).hint("standfast point list GROUP --dir DIR")
        }
        StoreError::Point(_) => coded(Exit::WrongState, 9)
            .hint("standfast status GROUP --dir DIR shows the copy's progress"),
        StoreError::Io { source, .. } => {
            Failure::io("the store failed", source).why(error.to_string())
        }
        StoreError::Failed(_) => coded(Exit::Failed, 2)
            .hint("look at the machine's log and disks, then start the target again"),
    }
}

/// An error of keys and certificates as a failure of a command.
pub fn identity_failure(error: &replicator::identity::IdentityError) -> Failure {
    Failure::coded(Exit::Failed, 3, "keys or certificates cannot be used").why(error.to_string())
}
