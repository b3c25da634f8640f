//! The replicator process: connects, starts where the target is durable, ships
//! epochs and copies, tells the filter what the target holds.
//!
//! Owns the tries and their back-off. Holds: only durable positions are shipped
//! (I7); it may be killed at any moment and goes on where the target is; trouble
//! here never blocks the filter. Before it: the journal. After it: the target.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockfilter::config::{GroupConfig, GroupPaths};
use blockfilter::engine::{Clock, Files};
use blockfilter::journal::reader::ReadError;
use blockfilter::names::Lsn;
use ring::rand::SecureRandom;

use crate::enroll::{AgentConfig, pki_dir};
use crate::epoch::EpochError;
use crate::frame::FrameError;
use crate::identity::{IdentityError, client_tls};
use crate::pace::Backoff;
use crate::session::{ErrorCode, ErrorMessage};
use crate::source::{LocalSource, Source};
use crate::status::{Shown, State, StatusSocket};
use crate::transport::{Channel, ChannelError};

mod ship;

/// What a replicator needs.
#[derive(Clone, Debug)]
pub struct ReplicatorConfig {
    /// The group.
    pub group: GroupConfig,
    /// Where its files are.
    pub paths: GroupPaths,
    /// The agent's state directory (`A`): certificates and target's addresses.
    pub agent_dir: PathBuf,
}

/// Why a replicator does not run at all.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// This machine has not joined a target.
    #[error("this machine has not joined a target")]
    NotJoined,
    /// Keys or certificates.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The system failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Journal(#[from] ReadError),
    #[error(transparent)]
    Epoch(#[from] EpochError),
    #[error("{0}")]
    Filter(io::Error),
    #[error("reading the disks: {0}")]
    Disks(io::Error),
    #[error("compression: {0}")]
    Codec(io::Error),
    #[error("{}", .0.message)]
    Told(ErrorMessage),
    #[error("{0}")]
    Diverged(String),
    #[error("generation {0} may write this group now; this source is fenced")]
    Fenced(u64),
    #[error("the journal overflowed; a full copy is due")]
    Frozen,
    #[error("the target answered out of turn")]
    OutOfTurn,
}

impl SessionError {
    /// Whoever answers at the target's address did not confirm a copy of ours: it said an error,
    /// what no target says, or is not the target that we joined. A line that fails says nothing.
    fn is_denial(&self) -> bool {
        match self {
            Self::Told(_) | Self::OutOfTurn | Self::Frame(_) | Self::Diverged(_) => true,
            Self::Channel(error) => {
                use ChannelError::*;
                match error {
                    Tls(_) | Frame(_) | Identity(_) => true,
                    Io(_) | Closed | Silent(_) | Timeout => false,
                }
            }
            _ => false,
        }
    }
}

/// Replicates one group until `stop`. Only one process a group.
pub fn run(
    config: &ReplicatorConfig,
    files: &dyn Files,
    clock: &Arc<dyn Clock>,
    stop: &AtomicBool,
) -> Result<(), RunError> {
    let agent = AgentConfig::load(files, &config.agent_dir)?.ok_or(RunError::NotJoined)?;
    let tls = client_tls(files, &pki_dir(&config.agent_dir))?;
    let shown = Shown::default();
    let _socket =
        StatusSocket::start(&config.paths.replicator_socket(), shown.clone(), clock.clone())?;
    let source: Arc<dyn Source> =
        Arc::new(LocalSource::new(config.group.clone(), config.paths.clone(), clock.clone()));
    let shipper = Shipper {
        group: config.group.clone(),
        targets: agent.targets,
        tls,
        source,
        clock: clock.clone(),
        shown,
        retry_us: RETRY_US,
    };
    shipper.run(stop);
    Ok(())
}

/// Replicates one group over whatever source and addresses.
#[derive(Debug)]
pub struct Shipper {
    /// The group.
    pub group: GroupConfig,
    /// Addresses of the target, tried in turn.
    pub targets: Vec<String>,
    /// Our certificate.
    pub tls: Arc<rustls::ClientConfig>,
    /// The filter.
    pub source: Arc<dyn Source>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Where status is told.
    pub shown: Shown,
    /// First wait after a failure ([`RETRY_US`]); later ones are longer.
    pub retry_us: u64,
}

impl Shipper {
    /// Session after session until `stop`.
    pub fn run(&self, stop: &AtomicBool) {
        let mut backoff = Backoff::new(self.retry_us);
        let mut here = Backoff::new(HERE_US);
        let random = ring::rand::SystemRandom::new();
        let mut damage = Damage::default();
        for turn in 0_usize.. {
            if stop.load(Ordering::SeqCst) || self.targets.is_empty() {
                break;
            }
            let target = &self.targets[turn % self.targets.len()];
            let began = self.clock.mono_us();
            let result = self.one_session(target, damage.lost(), stop);
            let held = self.clock.mono_us().saturating_sub(began) > HELD_US;
            let Err(error) = result else { continue };
            if error.is_denial()
                && let Err(error) = self.take_back()
            {
                tracing::warn!(%error, "the filter was not told that the target denies us");
            }
            if let SessionError::Journal(ReadError::Damaged(at, _)) = error {
                damage.met(at);
            }
            if held {
                backoff.worked();
                here.worked();
            }
            let mut bytes = [0; 8];
            // Without randomness there is only less jitter.
            let _ = random.fill(&mut bytes);
            let wait = match error {
                // The next session seeds; nothing to wait for.
                SessionError::Frozen | SessionError::Journal(ReadError::Gone(_)) if held => 0,
                // It starts beside us, or starts again in a moment.
                SessionError::Filter(_) => here.failed(u64::from_le_bytes(bytes)),
                _ => backoff.failed(u64::from_le_bytes(bytes)),
            };
            tracing::warn!(group = %self.group.group, target, %error, wait_us = wait, "no session");
            self.failed(&error, wait);
            self.pause(wait, stop);
        }
        self.shown.update(|s| (s.state, s.connected) = (State::Stopped, false));
    }

    fn one_session(
        &self,
        target: &str,
        journal_lost: Option<Lsn>,
        stop: &AtomicBool,
    ) -> Result<(), SessionError> {
        // Whatever the last session left: who is in the background may not get as far as this one.
        if let Err(error) = self.source.set_background(false) {
            tracing::debug!(%error, "the copy's priority cannot be changed now");
        }
        let mut channel =
            Channel::connect(target, self.tls.clone(), self.clock.clone(), CONNECT_MAX)?;
        self.shown.update(|s| {
            s.target = Some(target.to_owned());
            s.retry_us = None;
            s.sessions += 1;
        });
        let result = ship::session(self, &mut channel, journal_lost, stop);
        if let Err(SessionError::Diverged(why)) = &result {
            // The target's users see it too; failing to tell changes nothing.
            let message =
                ErrorMessage { code: ErrorCode::Diverged, message: why.clone(), hint: None };
            if let Ok(frame) = crate::frame::FrameBuf::message(crate::wire::Kind::Error, &message) {
                let _ = channel.send(&frame);
            }
        }
        channel.close();
        result
    }

    /// Tells the filter that the target may hold nothing. The session is over, its feed with it.
    fn take_back(&self) -> io::Result<()> {
        self.source.control()?.ship_floor(Lsn(0), false).map(drop)
    }

    fn failed(&self, error: &SessionError, wait_us: u64) {
        let state = match error {
            SessionError::Diverged(_) => State::Diverged,
            SessionError::Fenced(_) => State::Refused,
            SessionError::Frozen | SessionError::Journal(ReadError::Gone(_)) => State::Frozen,
            SessionError::Told(message) => match message.code {
                ErrorCode::NotAuthorised | ErrorCode::NameTaken | ErrorCode::Fenced => {
                    State::Refused
                }
                ErrorCode::Diverged => State::Diverged,
                _ => State::Connecting,
            },
            _ => State::Connecting,
        };
        let hint = match error {
            SessionError::Told(message) => message.hint.clone(),
            SessionError::Diverged(_) => Some(
                "nothing was merged; forget the group at the target, or protect the disks under \
                 another name"
                    .to_owned(),
            ),
            _ => None,
        };
        let retry_us = self.clock.mono_us() + wait_us;
        self.shown.update(|s| {
            s.state = state;
            s.connected = false;
            s.error = Some(error.to_string());
            s.hint = hint;
            s.retry_us = Some(retry_us);
        });
    }

    fn pause(&self, wait_us: u64, stop: &AtomicBool) {
        let until = self.clock.mono_us() + wait_us;
        while !stop.load(Ordering::SeqCst) {
            let left = until.saturating_sub(self.clock.mono_us());
            if left == 0 {
                break;
            }
            std::thread::sleep(Duration::from_micros(left.min(PAUSE_STEP_US)));
        }
    }
}

/// The newest damage in the journal, and how many sessions it ended. Other trouble in
/// between, of the network say, takes nothing of that back. (pure)
#[derive(Debug, Default)]
struct Damage(Option<(Lsn, u32)>);

impl Damage {
    fn met(&mut self, at: Lsn) {
        let before = self.0.filter(|(lsn, _)| *lsn == at).map_or(0, |(_, sessions)| sessions);
        self.0 = Some((at, before.saturating_add(1)));
    }

    /// Where the journal is given up for a full copy.
    fn lost(&self) -> Option<Lsn> {
        self.0.filter(|(_, sessions)| *sessions >= DAMAGED_TRIES).map(|(lsn, _)| lsn)
    }
}

/// First wait after a failure, microseconds.
pub const RETRY_US: u64 = 1_000_000;
/// The same if it is the filter that is not there.
const HERE_US: u64 = 20_000;
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// A session that lived this long was a success.
const HELD_US: u64 = 5_000_000;
const PAUSE_STEP_US: u64 = 50_000;
/// Sessions that found the journal damaged before it is given up for a full copy.
const DAMAGED_TRIES: u32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journal_is_given_up_where_three_sessions_met_the_same_damage() {
        let mut damage = Damage::default();
        for (at, lost) in [(8, None), (4, None), (4, None), (4, Some(4)), (4, Some(4)), (8, None)] {
            damage.met(Lsn(at));
            assert_eq!(damage.lost(), lost.map(Lsn));
        }
    }
}
