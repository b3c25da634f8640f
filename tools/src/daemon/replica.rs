//! What a group looks like at the target: the replication server's view and the
//! store's, as the Status document shows them.

use std::path::Path;
use std::sync::Arc;

use blockfilter::engine::real::RealFiles;
use blockfilter::engine::{Clock, Files};
use blockfilter::names::Name;
use target::server::{self, ReplicaState, ReplicaStatus, ServerError, TargetHandle};
use target::store::{GroupStore, SeedState, Store};

use super::status::{
    DiskStatus, GroupStatus, LinkStatus, PointsStatus, Positions, ResyncStatus, rfc3339,
};
use super::target::{TargetConfig, identity_failure, nbd_socket};
use crate::cli::unix_uri;
use crate::errors::{Failure, Outcome};

/// Starts the replication server.
pub fn serve(
    dir: &Path,
    config: &TargetConfig,
    store: Arc<Store>,
    clock: Arc<dyn Clock>,
) -> Outcome<TargetHandle> {
    let files: Arc<dyn Files> = Arc::new(RealFiles);
    let server = server::ServerConfig {
        listen: config.listen.clone(),
        pki: dir.join("pki"),
        tokens: dir.join("tokens"),
    };
    server::start(store, files, clock, &server).map_err(|error| match error {
        ServerError::Listen(address, error) => {
            Failure::io(format!("cannot listen on {address}"), &error)
                .hint("stop what listens there, or change \"listen\" in target.json")
        }
        ServerError::Identity(error) => identity_failure(&error),
        ServerError::Io(error) => Failure::io("cannot start the replication server", &error),
    })
}

/// One group of the Status document.
pub fn group_status(
    dir: &Path,
    name: &Name,
    group: &GroupStore,
    sessions: &[ReplicaStatus],
) -> GroupStatus {
    let state = group.state();
    let session = sessions.iter().find(|s| s.group == *name);
    let error = session.and_then(|s| s.error.clone()).or_else(|| state.failed.clone());
    let replica = session.map_or(ReplicaState::Empty, |s| s.state);
    let (health, reason) = health(replica, error.as_deref());
    let socket = nbd_socket(dir);
    let disk = |d: &target::store::DiskMeta| DiskStatus {
        disk: d.disk.to_string(),
        size_bytes: d.size_bytes,
        uri: Some(unix_uri(&format!("{name}.{}@latest", d.disk), &socket)),
        health: if state.failed.is_some() { "critical" } else { "healthy" }.into(),
        ..DiskStatus::default()
    };
    let admitted = session.and_then(|s| s.admitted);
    GroupStatus {
        group: name.to_string(),
        state: replica.as_str().into(),
        health: health.into(),
        reasons: reason.into_iter().collect(),
        role: "replica".into(),
        generation: Some(state.generation),
        incarnation: Some(state.incarnation),
        lsn: Positions { admitted, target_durable: Some(state.last), ..Positions::default() },
        backlog_bytes: admitted.map(|a| a.0.saturating_sub(state.last.0)),
        rpo_seconds: session.and_then(|s| s.rpo_seconds),
        recoverable_to: group.newest().map(|p| rfc3339(p.time_us)),
        recoverable: Some(state.last_consistent.is_some()),
        journal: None,
        resync: state.seed.as_ref().map(|seed| resync(seed, &state.meta.disks)),
        points: Some(PointsStatus {
            oldest: group.oldest().map(|p| rfc3339(p.time_us)),
            newest: group.newest().map(|p| rfc3339(p.time_us)),
            count: group.point_count() as u64,
        }),
        disks: state.meta.disks.iter().map(disk).collect(),
        link: session.map(|s| LinkStatus {
            connected: s.connected,
            peer: s.peer.clone().or_else(|| Some(s.owner.clone())),
            error: s.error.clone(),
            ..LinkStatus::default()
        }),
    }
}

/// Health follows from the state. (pure)
fn health(state: ReplicaState, error: Option<&str>) -> (&'static str, Option<String>) {
    if let Some(error) = error {
        return ("critical", Some(error.to_owned()));
    }
    let (health, reason) = match state {
        ReplicaState::Consistent => return ("healthy", None),
        ReplicaState::Empty => ("warning", "nothing was copied yet"),
        ReplicaState::Seeding => ("warning", "the first copy is not complete"),
        ReplicaState::Resyncing => ("warning", "a copy is under way; older points can be opened"),
        ReplicaState::Disconnected => ("critical", "the source is not connected"),
        ReplicaState::Diverged => ("critical", "the source's history is not the one stored here"),
    };
    (health, Some(reason.to_owned()))
}

/// Progress of a copy: what lies behind its cursor.
fn resync(seed: &SeedState, disks: &[target::store::DiskMeta]) -> ResyncStatus {
    let total: u64 = disks.iter().map(|d| d.size_bytes).sum();
    let (disk, offset) = seed.cursor;
    let before: u64 = disks.iter().take(disk as usize).map(|d| d.size_bytes).sum();
    let done = if seed.end.is_some() { total } else { (before + offset).min(total) };
    ResyncStatus {
        reason: if seed.first { "seed" } else { "reseed" }.into(),
        remaining_bytes: total - done,
        sent_bytes: done,
        rate_bytes_per_second: None,
        eta_seconds: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_consistent_connected_replica_is_healthy() {
        assert_eq!(health(ReplicaState::Consistent, None).0, "healthy");
        assert_eq!(health(ReplicaState::Consistent, Some("EIO")).0, "critical");
        for state in [ReplicaState::Empty, ReplicaState::Seeding, ReplicaState::Disconnected] {
            assert_ne!(health(state, None).0, "healthy");
        }
    }

    #[test]
    fn progress_counts_whole_disks_before_the_cursor() {
        let disk = |name: &str, size_bytes| target::store::DiskMeta {
            disk: name.parse().unwrap(),
            uuid: uuid::Uuid::nil(),
            size_bytes,
        };
        let seed =
            SeedState { first: true, s: blockfilter::names::Lsn(0), end: None, cursor: (1, 100) };
        let progress = resync(&seed, &[disk("a", 1000), disk("b", 500)]);
        assert_eq!((progress.sent_bytes, progress.remaining_bytes), (1100, 400));
    }
}
