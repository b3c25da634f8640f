//! What a protected group looks like from its machine: its filter's and its
//! replicator's answers, and the state that follows from them.
//!
//! [`judge`] is pure: both answers, or what is missing, give state, health and
//! reasons. Asking has a timeout of two seconds for each process.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use blockfilter::config::{GroupConfig, GroupPaths};
use blockfilter::control::{Client, FilterStatus, Mode, Reply, Request};
use blockfilter::names::Lsn;
use serde::Deserialize;

use super::status::{
    DiskStatus, GroupStatus, JournalStatus, LinkStatus, Positions, ResyncStatus, rfc3339,
};
use crate::cli::unix_uri;

/// What the two processes answered.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// The filter, if it answers.
    pub filter: Option<FilterStatus>,
    /// The replicator, if it answers.
    pub replicator: Option<ReplicatorView>,
}

/// The replicator's status line; unknown fields are ignored, missing ones empty.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ReplicatorView {
    /// connecting, seeding, streaming, lagging, frozen, diverged, refused, stopped.
    pub state: String,
    /// Whether a session is up.
    pub connected: bool,
    /// The target's address.
    pub target: Option<String>,
    /// The target holds everything below, durably.
    pub target_durable: Option<Lsn>,
    /// The target can serve its newest state.
    pub consistent: bool,
    /// The target's newest usable point.
    pub recoverable: Option<Lsn>,
    /// Age of that state, from the target.
    pub rpo_seconds: Option<f64>,
    /// Source's clock at that state.
    pub recoverable_to_us: Option<u64>,
    /// Round trip.
    pub rtt_us: Option<u64>,
    /// A seed under way.
    pub seed: Option<SeedView>,
    /// How it compresses.
    pub codec: Option<String>,
    /// Payload before compression.
    pub raw_bytes: Option<u64>,
    /// On the wire.
    pub wire_bytes: Option<u64>,
    /// The last error.
    pub error: Option<String>,
}

/// Progress of a seed.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct SeedView {
    /// Bytes looked at.
    pub done_bytes: u64,
    /// Bytes of all disks.
    pub total_bytes: u64,
    /// Bytes a second.
    pub rate_bytes_per_second: Option<f64>,
    /// Seconds left.
    pub eta_seconds: Option<f64>,
}

/// Asks both processes of a group.
pub fn ask(config: &GroupConfig, paths: &GroupPaths) -> View {
    let _ = config;
    View { filter: ask_filter(paths), replicator: ask_replicator(&paths.replicator_socket()) }
}

/// The filter's status, if it answers.
pub fn ask_filter(paths: &GroupPaths) -> Option<FilterStatus> {
    let mut client = Client::connect(&paths.filter_socket()).ok()?;
    match client.ask(&Request::Status, ASK_TIMEOUT) {
        Ok(Reply::Status(status)) => Some(*status),
        _ => None,
    }
}

fn ask_replicator(socket: &Path) -> Option<ReplicatorView> {
    let read = || -> io::Result<ReplicatorView> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ASK_TIMEOUT))?;
        stream.set_write_timeout(Some(ASK_TIMEOUT))?;
        stream.write_all(b"{\"cmd\":\"status\"}\n")?;
        let mut line = String::new();
        BufReader::new(stream).take(1 << 20).read_line(&mut line)?;
        serde_json::from_str(&line).map_err(io::Error::other)
    };
    read().ok()
}

/// Whether production can use the group: the filter answers and the files are there.
pub fn serves(config: &GroupConfig, paths: &GroupPaths) -> bool {
    let files = config.fuse.as_ref().is_none_or(|dir| {
        config.disks.iter().all(|d| {
            std::fs::metadata(dir.join(d.disk.as_str())).is_ok_and(|m| m.len() == d.size_bytes)
        })
    });
    files && ask_filter(paths).is_some()
}

/// State, health, and why it is not healthy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// A state of interface.md §1.
    pub state: &'static str,
    /// healthy, warning or critical.
    pub health: &'static str,
    /// Sentences for people.
    pub reasons: Vec<String>,
}

/// Derives state and health. (pure)
pub fn judge(view: &View) -> Judgement {
    let mut judgement = judge_copy(view);
    for disk in view.filter.iter().flat_map(|f| &f.disks) {
        if let Some(error) = &disk.error {
            judgement.health = "critical";
            judgement.reasons.push(format!("disk {}: {error}", disk.disk));
        }
    }
    judgement
}

/// The same without the disks' own trouble.
fn judge_copy(view: &View) -> Judgement {
    let say = |state, health, reason: &str| Judgement {
        state,
        health,
        reasons: if reason.is_empty() { Vec::new() } else { vec![reason.to_owned()] },
    };
    let Some(filter) = &view.filter else {
        return say("paused", "critical", "the filter does not answer: the disks are not served");
    };
    match filter.positions.mode {
        Mode::Unjournaled => {
            return say("unjournaled", "critical", "the journal failed; writes are not replicated");
        }
        Mode::BackingFailed => {
            return say(
                "backing_failed",
                "critical",
                "a backing file failed; its writes are refused",
            );
        }
        Mode::New | Mode::Shipping | Mode::Frozen => {}
    }
    let Some(replicator) = &view.replicator else {
        let state = if filter.positions.mode == Mode::New { "new" } else { "lagging" };
        let state = if filter.positions.mode == Mode::Frozen { "frozen" } else { state };
        return say(state, "critical", "the replicator does not answer");
    };
    let error = replicator.error.as_deref().unwrap_or("no connection to the target");
    match replicator.state.as_str() {
        "diverged" | "refused" | "fenced" => return say("fenced", "critical", error),
        _ => {}
    }
    if filter.positions.mode == Mode::Frozen && replicator.seed.is_none() {
        let why =
            if replicator.connected { "the journal overflowed; a full seed is due" } else { error };
        return say("frozen", "critical", why);
    }
    if replicator.seed.is_some() || replicator.state == "seeding" {
        if !replicator.connected {
            return say("seeding", "critical", error);
        }
        return say("seeding", "warning", "the first copy is not complete");
    }
    if filter.positions.mode == Mode::New {
        return say("new", if replicator.connected { "warning" } else { "critical" }, error);
    }
    if !replicator.connected {
        return say("lagging", "critical", error);
    }
    if !replicator.consistent {
        return say("seeding", "warning", "the target has not caught up with the first copy");
    }
    match replicator.rpo_seconds {
        Some(rpo) if rpo <= RPO_GOOD_S => say("protected", "healthy", ""),
        Some(_) => say("lagging", "warning", "the target is more than 15 s behind"),
        None => say("lagging", "warning", "the age of the target's newest state is not known yet"),
    }
}

/// One group of the Status document.
pub fn group_status(config: &GroupConfig, paths: &GroupPaths, view: &View) -> GroupStatus {
    let judgement = judge(view);
    let filter = view.filter.as_ref();
    let positions = filter.map(|f| &f.positions);
    let replicator = view.replicator.as_ref();
    let shipping = positions.is_some_and(|p| p.mode != Mode::New);
    let floor = positions.map(|p| p.ship_floor).filter(|_| shipping);
    let target_durable = replicator.and_then(|r| r.target_durable).or(floor);
    let backlog_bytes = match (positions, target_durable) {
        (Some(p), Some(t)) => Some(p.admitted.0.saturating_sub(t.0)),
        _ => None,
    };
    GroupStatus {
        group: config.group.to_string(),
        state: judgement.state.into(),
        health: judgement.health.into(),
        reasons: judgement.reasons,
        role: if judgement.state == "fenced" { "fenced" } else { "primary" }.into(),
        generation: positions.map(|p| p.generation),
        incarnation: positions.map(|p| p.incarnation),
        lsn: Positions {
            admitted: positions.map(|p| p.admitted),
            durable: positions.map(|p| p.durable),
            applied: positions.map(|p| p.applied),
            checkpoint: positions.map(|p| p.checkpoint),
            target_durable,
        },
        backlog_bytes,
        rpo_seconds: replicator.filter(|r| r.consistent).and_then(|r| r.rpo_seconds),
        recoverable_to: replicator.and_then(|r| r.recoverable_to_us).map(rfc3339),
        recoverable: replicator.map(|r| r.consistent),
        journal: filter.map(|f| JournalStatus {
            used_bytes: f.journal_used_bytes,
            capacity_bytes: f.journal_capacity_bytes,
        }),
        resync: replicator.and_then(|r| r.seed.as_ref()).map(|seed| ResyncStatus {
            reason: "seed".into(),
            remaining_bytes: seed.total_bytes.saturating_sub(seed.done_bytes),
            sent_bytes: seed.done_bytes,
            rate_bytes_per_second: seed.rate_bytes_per_second,
            eta_seconds: seed.eta_seconds,
        }),
        points: None,
        disks: disks(config, paths, filter),
        link: replicator.map(|r| LinkStatus {
            connected: r.connected,
            peer: r.target.clone(),
            error: r.error.clone(),
            raw_bytes: r.raw_bytes,
            wire_bytes: r.wire_bytes,
            rtt_seconds: r.rtt_us.map(|us| us as f64 / 1e6),
            codec: r.codec.clone(),
        }),
    }
}

/// The disks of a group, as documents show them.
pub fn disks(
    config: &GroupConfig,
    paths: &GroupPaths,
    filter: Option<&FilterStatus>,
) -> Vec<DiskStatus> {
    let failed = |disk: &str| {
        filter.is_none_or(|f| f.disks.iter().any(|d| d.disk.as_str() == disk && d.error.is_some()))
    };
    let one = |d: &blockfilter::config::DiskConfig| DiskStatus {
        disk: d.disk.to_string(),
        size_bytes: d.size_bytes,
        backing: Some(d.path.display().to_string()),
        uri: Some(unix_uri(&config.export(&d.disk), &paths.nbd_socket())),
        file: config.fuse.as_ref().map(|f| f.join(d.disk.as_str()).display().to_string()),
        health: if failed(d.disk.as_str()) { "critical" } else { "healthy" }.into(),
    };
    config.disks.iter().map(one).collect()
}

const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// RPO up to which a group counts as protected, in seconds.
const RPO_GOOD_S: f64 = 15.0;

#[cfg(test)]
mod tests {
    use super::*;

    fn view(mode: Mode, replicator: Option<ReplicatorView>) -> View {
        let mut filter = FilterStatus::default();
        filter.positions.mode = mode;
        View { filter: Some(filter), replicator }
    }

    fn streaming() -> ReplicatorView {
        ReplicatorView {
            state: "streaming".into(),
            connected: true,
            consistent: true,
            rpo_seconds: Some(0.1),
            ..ReplicatorView::default()
        }
    }

    #[test]
    fn protected_is_only_said_of_a_connected_consistent_recent_target() {
        assert_eq!(judge(&view(Mode::Shipping, Some(streaming()))).state, "protected");
        type Change = fn(&mut ReplicatorView);
        let cases: [(&str, Change); 5] = [
            ("lagging", |r| r.connected = false),
            ("lagging", |r| r.rpo_seconds = Some(100.0)),
            ("lagging", |r| r.rpo_seconds = None),
            ("seeding", |r| r.consistent = false),
            ("seeding", |r| r.seed = Some(SeedView::default())),
        ];
        for (state, change) in cases {
            let mut replicator = streaming();
            change(&mut replicator);
            let judgement = judge(&view(Mode::Shipping, Some(replicator.clone())));
            assert_eq!(judgement.state, state, "{replicator:?}");
            assert_ne!(judgement.health, "healthy", "{replicator:?}");
        }
    }

    #[test]
    fn a_disk_that_refuses_writes_is_critical_however_good_the_copy_is() {
        let mut view = view(Mode::Shipping, Some(streaming()));
        let (disk, error) = ("d".parse().unwrap(), Some("it is full".to_owned()));
        let disks = &mut view.filter.as_mut().unwrap().disks;
        disks.push(blockfilter::control::DiskStatus { disk, size_bytes: 512, error });
        let judgement = judge(&view);
        assert_eq!((judgement.state, judgement.health), ("protected", "critical"));
        assert!(judgement.reasons[0].contains("full"), "{judgement:?}");
    }

    #[test]
    fn failures_of_the_source_come_before_everything() {
        assert_eq!(judge(&View::default()).health, "critical");
        for (mode, state) in [
            (Mode::Unjournaled, "unjournaled"),
            (Mode::BackingFailed, "backing_failed"),
            (Mode::Frozen, "frozen"),
        ] {
            let judgement = judge(&view(mode, Some(streaming())));
            assert_eq!((judgement.state, judgement.health), (state, "critical"));
        }
    }
}
