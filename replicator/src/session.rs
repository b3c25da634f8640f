//! What the two sides say to each other, and what the source decides. (pure)
//!
//! Owns the JSON messages of a session and [`decide`]: from the filter's
//! positions and the target's answer to where the stream starts. Holds: the
//! stream continues exactly where the target is durable, or a seed starts;
//! histories that do not agree are never merged. Unknown fields are ignored
//! and new ones have defaults, so sites may be upgraded one at a time.
//!
//! ```text
//! source                                   target
//! Hello            ──────────────────────▶
//!                  ◀──────────────────────  HelloAck (or Error)
//! SeedBegin{s}     ──────────────────────▶  only if a seed starts
//! Epoch, Copy, Heartbeat … ──────────────▶
//!                  ◀──────────────────────  Ack, at each change and heartbeat
//! SeedEnd{e}       ──────────────────────▶
//! ```

use blockfilter::control::{Mode, Positions};
use blockfilter::names::{Lsn, Name};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::identity::Role;

/// One disk, as the source has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Its name.
    pub disk: Name,
    /// Random id, given at protect time.
    pub uuid: Uuid,
    /// Size in bytes.
    pub size_bytes: u64,
}

/// The source's first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Wire version.
    pub version: u8,
    /// The group.
    pub group: Name,
    /// Its id.
    pub group_uuid: Uuid,
    /// Its disks, in the order of their index.
    pub disks: Vec<DiskInfo>,
    /// +1 at each change of who may write.
    pub generation: u64,
    /// +1 at each unclean start.
    pub incarnation: u64,
    /// Where earlier incarnations ended.
    pub history: Vec<(u64, Lsn)>,
    /// What is durable at the source.
    pub durable: Lsn,
    /// What the source believes the target holds.
    pub ship_floor: Lsn,
    /// What the journal keeps.
    pub mode: Mode,
}

/// What the target would like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Want {
    /// The stream, from `last` on.
    Stream,
    /// A full copy: nothing usable is here.
    Seed,
    /// The rest of a copy that was interrupted, and the stream from `last` on.
    ResumeSeed,
    /// Nothing: a newer generation may write.
    Fenced,
}

/// A copy that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedAt {
    /// Blocks that are zero may be omitted.
    pub first: bool,
    /// Where copies are ordered.
    pub s: Lsn,
    /// Index of the disk of `cursor`; lower ones are complete.
    pub cursor_disk: u32,
    /// Byte of that disk below which everything is durable.
    pub cursor: u64,
    /// All is copied.
    pub ended: bool,
}

/// The target's answer to [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloAck {
    /// What it would like.
    pub want: Want,
    /// Its generation.
    pub generation: u64,
    /// Incarnation of its newest record.
    pub incarnation: u64,
    /// Its durable end of the stream.
    pub last: Lsn,
    /// Its newest usable point.
    pub consistent: Option<Lsn>,
    /// A copy that is under way.
    pub seed: Option<SeedAt>,
}

/// A full copy starts; its blocks are ordered at `s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedBegin {
    /// The stream continues here.
    pub s: Lsn,
    /// Of the source.
    pub incarnation: u64,
    /// Of the source.
    pub generation: u64,
}

/// Everything is copied; consistent from `e` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedEnd {
    /// Admitted position after the last read, or beyond.
    pub e: Lsn,
}

/// Sent at least every [`HEARTBEAT_US`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Exclusive end of what has an LSN at the source.
    pub admitted: Lsn,
    /// How old that knowledge is at sending, microseconds.
    pub age_us: u64,
    /// The source's monotonic clock at sending; echoed.
    pub mono_us: u64,
    /// The newest Ack of this session; without it nothing is proved of time.
    #[serde(default)]
    pub echo: Option<Echo>,
    /// A processor of the source's that a target on the same machine leaves free. Another one does not
    /// look at it.
    #[serde(default)]
    pub held_cpu: Option<u32>,
}

/// An Ack's time, returned. Sent at least `held_us` after `mono_us` by the target's
/// clock, however long the Ack or what returns it was on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Echo {
    /// The Ack's `mono_us`.
    pub mono_us: u64,
    /// From when the Ack was taken to the heartbeat, microseconds of the source's clock.
    pub held_us: u64,
}

/// What the target holds, durably.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// Its durable end of the stream.
    pub durable: Lsn,
    /// Incarnation of its newest record.
    pub incarnation: u64,
    /// A copy that is under way.
    pub seed: Option<SeedAt>,
    /// The newest usable point.
    pub consistent: Option<Lsn>,
    /// Age of the newest recoverable state, microseconds; None: not provable.
    pub rpo_us: Option<u64>,
    /// `mono_us` of this session's newest heartbeat.
    pub echo_us: Option<u64>,
    /// The target's monotonic clock at sending; returned as [`Echo`].
    #[serde(default)]
    pub mono_us: Option<u64>,
    /// The source's wall clock at `consistent`, microseconds.
    #[serde(default)]
    pub recoverable_us: Option<u64>,
}

/// Why a side gives up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorMessage {
    /// What kind.
    pub code: ErrorCode,
    /// What failed and why.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// Kinds of errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// No certificate, or not of this group's owner.
    NotAuthorised,
    /// The name belongs to another group or agent.
    NameTaken,
    /// Not there.
    NotFound,
    /// A newer generation may write.
    Fenced,
    /// The histories of the sides do not agree.
    Diverged,
    /// What was sent breaks the protocol.
    Protocol,
    /// A newer session took over, or too many connections.
    Busy,
    /// A token is unknown, expired or used.
    Token,
    /// The target cannot store now.
    Storage,
    /// Anything else, also of a newer peer.
    #[serde(other)]
    Other,
}

/// Requests outside of a replication session, one at a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "rpc", rename_all = "snake_case")]
pub enum Rpc {
    /// Joins; the only one for a peer without certificate.
    Enrol {
        /// The token's secret.
        secret: String,
        /// PEM.
        csr: String,
        /// The machine's name, for people.
        host: String,
    },
    /// Makes the group if it does not exist; refused if the name is taken.
    CreateGroup {
        /// Its name.
        group: Name,
        /// Its id.
        uuid: Uuid,
        /// Its disks.
        disks: Vec<DiskInfo>,
    },
    /// Whether the name is free or ours.
    CheckGroup {
        /// The name.
        group: Name,
        /// The id it should have, if it exists.
        uuid: Option<Uuid>,
    },
    /// Whether a point of the group has the tag.
    HasTag {
        /// The group.
        group: Name,
        /// The tag.
        tag: Name,
    },
}

/// Answers to [`Rpc`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum RpcReply {
    /// To Enrol.
    Enrolled {
        /// The certificate's name.
        agent: String,
        /// What it may be used for.
        role: Role,
        /// PEM.
        cert: String,
        /// PEM.
        ca: String,
    },
    /// To CreateGroup: it is there.
    Created,
    /// To CheckGroup.
    Group {
        /// Whether it exists (with our id and owned by us).
        exists: bool,
    },
    /// To HasTag.
    Tag {
        /// Whether it is in use.
        used: bool,
    },
    /// It was refused.
    Refused(ErrorMessage),
}

/// Where a session starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// The stream, from here.
    Stream {
        /// Durable end at the target.
        from: Lsn,
    },
    /// The stream from `from`, and the copy from its cursor.
    ResumeSeed {
        /// Durable end at the target.
        from: Lsn,
        /// The copy.
        seed: SeedAt,
    },
    /// Begin a full copy; `first`: the target has nothing usable.
    Seed {
        /// Blocks that are zero may be omitted.
        first: bool,
        /// Why, for people.
        reason: &'static str,
    },
    /// Stop: a newer generation may write.
    Fenced {
        /// It.
        generation: u64,
    },
    /// Stop: the target holds what the source never had, or forgot.
    Diverged {
        /// What does not agree.
        why: String,
    },
}

/// Decides where a session starts. Whether the journal still holds the
/// position is found out by reading it; if not, [`seed_again`].
pub fn decide(source: &Positions, ack: &HelloAck) -> Start {
    if ack.want == Want::Fenced || ack.generation > source.generation {
        return Start::Fenced { generation: ack.generation };
    }
    if ack.want == Want::Seed {
        return Start::Seed { first: ack.consistent.is_none(), reason: "first copy" };
    }
    if let Err(why) = agree(source, ack.incarnation, ack.last) {
        return Start::Diverged { why };
    }
    match source.mode {
        Mode::New => return seed_again(ack, "the journal kept nothing for the target"),
        Mode::Frozen => return seed_again(ack, "the journal overflowed while the target was away"),
        Mode::Unjournaled => return seed_again(ack, "the journal failed"),
        Mode::Shipping | Mode::BackingFailed => {}
    }
    match ack.seed {
        Some(seed) if ack.want == Want::ResumeSeed && !seed.ended => {
            Start::ResumeSeed { from: ack.last, seed }
        }
        _ => Start::Stream { from: ack.last },
    }
}

/// What the target holds when a session starts, as the filter is told: everything below the
/// position, and whether as a complete copy.
pub fn held(start: &Start, ack: &HelloAck) -> (Lsn, bool) {
    match start {
        Start::Stream { from } | Start::ResumeSeed { from, .. } => {
            (*from, is_whole(ack.last, ack.seed, ack.consistent))
        }
        Start::Seed { .. } | Start::Fenced { .. } | Start::Diverged { .. } => (Lsn(0), false),
    }
}

/// Whether a target that is durable to `last` has a complete copy as of there.
pub fn is_whole(last: Lsn, seed: Option<SeedAt>, consistent: Option<Lsn>) -> bool {
    seed.is_none() && consistent.is_some_and(|point| point >= last)
}

/// Whether an Ack tells that the seed is complete whose end was told after the heartbeat of
/// `ended_us`. One from before that, or from before the seed, knows of no seed either: it does
/// not return a later heartbeat.
pub fn is_seed_over(ended_us: Option<u64>, ack: &Ack) -> bool {
    let newer = ended_us.zip(ack.echo_us).is_some_and(|(ended, echo)| echo > ended);
    newer && ack.seed.is_none()
}

/// The start when the journal no longer holds what the target needs.
pub fn seed_again(ack: &HelloAck, reason: &'static str) -> Start {
    Start::Seed { first: ack.consistent.is_none(), reason }
}

/// Whether `(incarnation, last)` at the target lies within the source's history.
fn agree(source: &Positions, incarnation: u64, last: Lsn) -> Result<(), String> {
    if incarnation == source.incarnation {
        if last > source.durable {
            return Err(format!(
                "the target holds position {last} of incarnation {incarnation}, but the source is \
                 durable only to {}",
                source.durable
            ));
        }
        return Ok(());
    }
    match source.history.iter().find(|(known, _)| *known == incarnation) {
        Some((_, end)) if last <= *end => Ok(()),
        Some((_, end)) => Err(format!(
            "the target holds position {last} of incarnation {incarnation}, which ended at {end} \
             at the source: the source forgot what the target holds"
        )),
        None => Err(format!("the source never had incarnation {incarnation} of the target")),
    }
}

/// A group's short id in frames: the first half of its id, as a number.
pub fn group_id(uuid: &Uuid) -> u64 {
    uuid.as_u64_pair().0
}

/// Whether the copy keeps up, so that it may give way to clients: the age of the
/// newest recoverable state, in microseconds, says so; none says that it does not.
pub fn keeps_up(rpo_us: Option<u64>) -> bool {
    rpo_us.is_some_and(|us| us < BEHIND_US)
}

/// A healthy copy is two to three epochs behind.
const BEHIND_US: u64 = 300_000;

/// Longest time between two heartbeats, microseconds.
pub const HEARTBEAT_US: u64 = 100_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn source(incarnation: u64, durable: u64, history: &[(u64, u64)], mode: Mode) -> Positions {
        Positions {
            durable: Lsn(durable),
            admitted: Lsn(durable),
            incarnation,
            generation: 1,
            history: history.iter().map(|(i, e)| (*i, Lsn(*e))).collect(),
            mode,
            ..Default::default()
        }
    }

    fn target(want: Want, incarnation: u64, last: u64) -> HelloAck {
        let consistent = (want != Want::Seed).then_some(Lsn(last));
        HelloAck { want, generation: 1, incarnation, last: Lsn(last), consistent, seed: None }
    }

    #[test]
    fn a_copy_without_a_recoverable_state_does_not_keep_up() {
        assert!(keeps_up(Some(BEHIND_US - 1)));
        assert!(!keeps_up(Some(BEHIND_US)));
        assert!(!keeps_up(None));
    }

    #[test]
    fn the_stream_resumes_where_the_target_is_durable() {
        let here = source(1, 900, &[], Mode::Shipping);
        let ack = target(Want::Stream, 1, 500);
        assert_eq!(decide(&here, &ack), Start::Stream { from: Lsn(500) });
        let restarted = source(2, 900, &[(1, 600)], Mode::Shipping);
        assert_eq!(decide(&restarted, &ack), Start::Stream { from: Lsn(500) });
        let at_the_end = source(2, 600, &[(1, 500)], Mode::Shipping);
        assert_eq!(decide(&at_the_end, &ack), Start::Stream { from: Lsn(500) });
    }

    #[test]
    fn histories_that_do_not_agree_are_never_merged() {
        for here in [
            source(1, 499, &[], Mode::Shipping),
            source(2, 900, &[(1, 499)], Mode::Shipping),
            source(3, 900, &[(2, 600)], Mode::Shipping),
            source(0, 900, &[], Mode::Shipping),
            source(2, 900, &[(1, 499)], Mode::Frozen),
        ] {
            let start = decide(&here, &target(Want::Stream, 1, 500));
            assert!(matches!(start, Start::Diverged { .. }), "{here:?}");
        }
    }

    #[test]
    fn an_empty_target_is_seeded_and_a_frozen_group_again() {
        let here = source(1, 900, &[], Mode::New);
        let start = decide(&here, &target(Want::Seed, 0, 0));
        assert!(matches!(start, Start::Seed { first: true, .. }));
        let frozen = source(1, 900, &[], Mode::Frozen);
        let start = decide(&frozen, &target(Want::Stream, 1, 500));
        assert!(matches!(start, Start::Seed { first: false, .. }));
    }

    #[test]
    fn an_interrupted_seed_goes_on_at_its_cursor() {
        let here = source(1, 900, &[], Mode::Shipping);
        let mut ack = target(Want::ResumeSeed, 1, 500);
        let seed =
            SeedAt { first: true, s: Lsn(400), cursor_disk: 0, cursor: 1 << 20, ended: false };
        ack.seed = Some(seed);
        assert_eq!(decide(&here, &ack), Start::ResumeSeed { from: Lsn(500), seed });
        ack.seed = Some(SeedAt { ended: true, ..seed });
        ack.want = Want::Stream;
        assert_eq!(decide(&here, &ack), Start::Stream { from: Lsn(500) });
    }

    #[test]
    fn a_copy_counts_as_complete_only_at_the_newest_point_and_without_a_seed() {
        let here = source(1, 900, &[], Mode::Shipping);
        let told = |ack: &HelloAck| held(&decide(&here, ack), ack);
        let whole = target(Want::Stream, 1, 500);
        assert_eq!(told(&whole), (Lsn(500), true));
        let older = HelloAck { consistent: Some(Lsn(499)), ..whole.clone() };
        assert_eq!(told(&older), (Lsn(500), false));
        assert_eq!(told(&HelloAck { consistent: None, ..whole.clone() }), (Lsn(500), false));
        let copying = SeedAt { first: false, s: Lsn(400), cursor_disk: 0, cursor: 0, ended: false };
        for ended in [false, true] {
            let seed = Some(SeedAt { ended, ..copying });
            let want = if ended { Want::Stream } else { Want::ResumeSeed };
            assert_eq!(told(&HelloAck { want, seed, ..whole.clone() }), (Lsn(500), false));
        }
        for ack in [
            target(Want::Seed, 0, 0),
            target(Want::Fenced, 1, 500),
            target(Want::Stream, 1, 901),
            target(Want::Stream, 7, 500),
        ] {
            assert_eq!(told(&ack), (Lsn(0), false), "{ack:?}");
        }
        let frozen = source(1, 900, &[], Mode::Frozen);
        assert_eq!(held(&decide(&frozen, &whole), &whole), (Lsn(0), false));
    }

    #[test]
    fn an_ack_from_before_the_end_of_a_seed_does_not_end_it() {
        let ack = |echo_us, seed| Ack {
            durable: Lsn(500),
            incarnation: 1,
            seed,
            consistent: Some(Lsn(500)),
            rpo_us: None,
            echo_us,
            mono_us: None,
            recoverable_us: None,
        };
        assert!(is_seed_over(Some(70), &ack(Some(71), None)));
        for (ended, echo) in
            [(None, Some(71)), (Some(70), None), (Some(70), Some(70)), (Some(70), Some(9))]
        {
            assert!(!is_seed_over(ended, &ack(echo, None)), "{ended:?} {echo:?}");
        }
        let seed = SeedAt { first: false, s: Lsn(1), cursor_disk: 0, cursor: 0, ended: true };
        assert!(!is_seed_over(Some(70), &ack(Some(71), Some(seed))), "not caught up with its end");
    }

    #[test]
    fn a_newer_generation_fences() {
        let here = source(1, 900, &[], Mode::Shipping);
        let mut ack = target(Want::Stream, 1, 500);
        ack.generation = 2;
        assert_eq!(decide(&here, &ack), Start::Fenced { generation: 2 });
    }

    #[test]
    fn fields_and_errors_of_a_newer_peer_are_ignored() {
        let text = r#"{"code":"from_the_future","message":"m","hint":null,"more":1}"#;
        let message: ErrorMessage = serde_json::from_str(text).unwrap();
        assert_eq!(message.code, ErrorCode::Other);
    }
}
