//! The Status document (interface.md §1), for agent and target alike.
//!
//! A field that does not apply is null. LSNs are decimal strings. Documents are
//! made anew for each question, from what the processes answer within a
//! second: nothing is remembered, so nothing is stale.

use blockfilter::names::Lsn;
use serde::{Deserialize, Serialize};

use crate::output::table;
use crate::units::{show_bytes, show_seconds};

/// Everything a daemon tells about itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// `standfast/v1/Status`.
    pub schema: String,
    /// `agent` or `target`.
    pub role: String,
    /// The groups.
    pub groups: Vec<GroupStatus>,
    /// Processes of this state directory.
    pub processes: Vec<ProcessStatus>,
    /// `io_uring`, or `blocking (why)`; null while nothing runs.
    pub io_engine: Option<String>,
    /// Where the control socket is (long paths get a short hashed one).
    #[serde(default)]
    pub control_socket: Option<String>,
    /// Where the NBD server listens, at the target.
    #[serde(default)]
    pub nbd: Vec<String>,
}

/// One group.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Its name.
    pub group: String,
    /// One of the states of interface.md §1.
    pub state: String,
    /// healthy, warning or critical.
    pub health: String,
    /// Why it is not healthy, for people.
    #[serde(default)]
    pub reasons: Vec<String>,
    /// primary, replica or fenced.
    pub role: String,
    /// +1 at each change of who may write.
    pub generation: Option<u64>,
    /// +1 at each unclean start.
    pub incarnation: Option<u64>,
    /// Positions.
    pub lsn: Positions,
    /// Durable here, not yet durable at the target.
    pub backlog_bytes: Option<u64>,
    /// Age of the newest state recoverable at the target; null if it cannot be proved.
    pub rpo_seconds: Option<f64>,
    /// The source's time of that state, RFC 3339.
    pub recoverable_to: Option<String>,
    /// Whether any state can be recovered at the target.
    pub recoverable: Option<bool>,
    /// The journal, at the source.
    pub journal: Option<JournalStatus>,
    /// A seed or resync under way.
    pub resync: Option<ResyncStatus>,
    /// Recovery points, at the target.
    pub points: Option<PointsStatus>,
    /// The disks.
    pub disks: Vec<DiskStatus>,
    /// The link to the other side.
    #[serde(default)]
    pub link: Option<LinkStatus>,
}

/// Positions of a group; null where this side does not know one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Positions {
    /// Has an LSN.
    pub admitted: Option<Lsn>,
    /// Durable in the journal.
    pub durable: Option<Lsn>,
    /// Written to the disks.
    pub applied: Option<Lsn>,
    /// Synced on the disks.
    pub checkpoint: Option<Lsn>,
    /// Durable at the target.
    pub target_durable: Option<Lsn>,
}

/// Room in the journal.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct JournalStatus {
    /// Cannot be recycled now.
    pub used_bytes: u64,
    /// All chunks.
    pub capacity_bytes: u64,
}

/// A seed or resync.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ResyncStatus {
    /// `seed`, `reseed`.
    pub reason: String,
    /// Bytes not looked at yet.
    pub remaining_bytes: u64,
    /// Bytes looked at (holes and zeroes included).
    pub sent_bytes: u64,
    /// Bytes a second.
    pub rate_bytes_per_second: Option<f64>,
    /// Seconds left.
    pub eta_seconds: Option<f64>,
}

/// Recovery points.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PointsStatus {
    /// Time of the oldest usable one.
    pub oldest: Option<String>,
    /// Time of the newest usable one.
    pub newest: Option<String>,
    /// How many.
    pub count: u64,
}

/// One disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its name.
    pub disk: String,
    /// Size.
    pub size_bytes: u64,
    /// The backing file or device, at the source.
    pub backing: Option<String>,
    /// Its NBD URI.
    pub uri: Option<String>,
    /// Its file, with `--fuse`.
    pub file: Option<String>,
    /// healthy or critical.
    pub health: String,
}

/// The link to the other side.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// Whether a session is up.
    pub connected: bool,
    /// The other side.
    pub peer: Option<String>,
    /// The last error, if not connected.
    pub error: Option<String>,
    /// Payload before compression.
    pub raw_bytes: Option<u64>,
    /// Bytes on the wire.
    pub wire_bytes: Option<u64>,
    /// Round trip.
    pub rtt_seconds: Option<f64>,
    /// How it is compressed now.
    pub codec: Option<String>,
}

/// One process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStatus {
    /// agent, filter, replicator, fuse, target.
    pub role: String,
    /// Its group.
    pub group: Option<String>,
    /// Process id; null while it is not running.
    pub pid: Option<u32>,
    /// How often it was started again.
    pub restarts: u32,
    /// How it ended last.
    #[serde(default)]
    pub last_end: Option<String>,
}

impl Status {
    /// For people.
    pub fn text(&self) -> String {
        if self.groups.is_empty() {
            return format!("{}: no groups\n", self.role);
        }
        let header = ["GROUP", "STATE", "RECOVERABLE TO", "RPO", "BACKLOG", "POINTS", "HEALTH"];
        let rows = self.groups.iter().map(GroupStatus::row).collect();
        let mut text = table(&header, rows);
        for group in &self.groups {
            for reason in &group.reasons {
                text.push_str(&format!("{}: {reason}\n", group.group));
            }
            if let Some(resync) = &group.resync {
                text.push_str(&format!("{}: {}\n", group.group, resync.text()));
            }
        }
        text
    }
}

impl GroupStatus {
    fn row(&self) -> Vec<String> {
        let dash = || "-".to_owned();
        vec![
            self.group.clone(),
            self.state.clone(),
            self.recoverable_to.clone().unwrap_or_else(dash),
            self.rpo_seconds.map_or_else(dash, show_seconds),
            self.backlog_bytes.map_or_else(dash, show_bytes),
            self.points.as_ref().map_or_else(dash, |p| p.count.to_string()),
            self.health.clone(),
        ]
    }
}

impl ResyncStatus {
    fn text(&self) -> String {
        let total = self.sent_bytes + self.remaining_bytes;
        let rate = self.rate_bytes_per_second.unwrap_or(0.0) as u64;
        let eta = self.eta_seconds.map_or("?".into(), show_seconds);
        format!(
            "{} {} of {}, {}/s, {eta} left",
            self.reason,
            show_bytes(self.sent_bytes),
            show_bytes(total),
            show_bytes(rate)
        )
    }
}

/// RFC 3339 in UTC, with milliseconds, of microseconds since 1970.
pub fn rfc3339(wall_us: u64) -> String {
    let us = i64::try_from(wall_us).unwrap_or(0);
    match jiff::Timestamp::from_microsecond(us) {
        Ok(time) => format!("{time:.3}"),
        Err(_) => "1970-01-01T00:00:00Z".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_strings_and_what_does_not_apply_is_null() {
        let mut group = GroupStatus { group: "g".into(), ..GroupStatus::default() };
        group.lsn.durable = Some(Lsn(u64::MAX));
        let json = serde_json::to_value(&group).unwrap();
        assert_eq!(json["lsn"]["durable"], u64::MAX.to_string());
        assert!(json["lsn"]["applied"].is_null() && json["rpo_seconds"].is_null());
    }

    #[test]
    fn times_are_utc_with_milliseconds() {
        assert_eq!(rfc3339(1_500_000), "1970-01-01T00:00:01.500Z");
    }
}
