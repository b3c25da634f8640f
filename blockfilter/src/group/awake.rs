//! Keeps idle processors from falling asleep while clients and the group's thread wake each
//! other all the time. (the decision is pure)
//!
//! An idle processor sleeps soon, and to wake it takes longer than most of what it is woken
//! for; a virtual one leaves its guest to sleep. Linux takes a request against that, which ends
//! when the file is closed, at the latest with the process (`/dev/cpu_dma_latency`,
//! Documentation/power/pm_qos_interface.rst). Drivers of sound and serial devices make it while
//! they transfer.
//!
//! It holds for every processor, and costs power, or the host's time. So it is made only on small
//! machines, only while messages come by the thousand a second, and not if
//! `STANDFAST_KEEP_AWAKE` is `0`. While a journal that hangs keeps the thread it is not taken back.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// Makes the request, and takes it back.
#[derive(Debug)]
pub(super) struct Awake {
    /// Where to make it; None where it must not be made, or was refused.
    device: Option<PathBuf>,
    /// The request, while it holds.
    request: Option<File>,
    decision: Decision,
}

impl Awake {
    pub(super) fn new() -> Self {
        let asked = std::env::var("STANDFAST_KEEP_AWAKE").unwrap_or_default();
        // All of the machine, whatever this process may use.
        let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
        Self::at(may(&asked, &online).then(|| DEVICE.into()))
    }

    fn at(device: Option<PathBuf>) -> Self {
        Self { device, request: None, decision: Decision::default() }
    }

    /// A connection of a client has something to do. To be called once a wait and connection.
    pub(super) fn heard(&mut self) {
        self.decision.heard += 1;
    }

    /// To be called before a wait, at `now` (monotonic microseconds).
    pub(super) fn look(&mut self, now: u64) {
        let Some(device) = &self.device else { return };
        if now < self.decision.due {
            return;
        }
        let wanted = self.decision.take(now, self.request.is_some());
        if !wanted {
            self.request = None;
        } else if self.request.is_none() {
            let driver = std::fs::read_to_string(DRIVER).unwrap_or_default();
            match request(device, limit(&driver)) {
                Ok(file) => self.request = Some(file),
                Err(error) => {
                    tracing::debug!(%error, "{}: idle processors may sleep", device.display());
                    self.device = None;
                }
            }
        }
    }

    /// When to look again though nothing came; monotonic microseconds.
    pub(super) fn due(&self) -> Option<u64> {
        self.request.as_ref().map(|_| self.decision.due)
    }
}

/// The kernel's promise that no idle processor takes longer than `limit` microseconds to be back,
/// for as long as the file is open.
fn request(device: &Path, limit: u32) -> io::Result<File> {
    let mut file = File::options().write(true).open(device)?;
    // Text of ten characters; four bytes would be the number itself.
    file.write_all(format!("{limit:#010x}").as_bytes())?;
    Ok(file)
}

/// Processors in a list like `0-3,8`.
fn count(list: &str) -> Option<u32> {
    let counts = list.trim().split(',').map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.parse::<u32>().ok()?.checked_sub(first.parse().ok()?)? + 1)
    });
    counts.sum()
}

/// Whether it may be made on a machine with these processors.
fn may(asked: &str, online: &str) -> bool {
    asked != "0" && count(online).is_some_and(|count| count <= CPUS_MAX)
}

/// Microseconds. A real processor's lightest sleep is good enough. A virtual one says that it
/// takes no longer than that, and does.
fn limit(driver: &str) -> u32 {
    if driver.trim() == "haltpoll" { 0 } else { LIGHTEST }
}

/// When the request is worth its price. (pure)
#[derive(Debug, Default)]
struct Decision {
    /// Next look, monotonic microseconds.
    due: u64,
    /// The last look.
    since: u64,
    /// Times that messages came since then.
    heard: u64,
    /// Looks in a row that saw few.
    quiet: u32,
}

impl Decision {
    /// Whether it is worth its price from `now` on. `held`: it is made.
    fn take(&mut self, now: u64, held: bool) -> bool {
        let elapsed = now.saturating_sub(self.since).max(1);
        let many = self.heard.saturating_mul(1_000_000) >= HEARD_MIN.saturating_mul(elapsed);
        (self.since, self.due, self.heard) = (now, now + LOOK, 0);
        self.quiet = if many { 0 } else { self.quiet.saturating_add(1) };
        many || (held && self.quiet < QUIET_MAX)
    }
}

const DEVICE: &str = "/dev/cpu_dma_latency";
const DRIVER: &str = "/sys/devices/system/cpu/cpuidle/current_driver";
/// Longest way back from the lightest sleep (C1) of processors of today, microseconds.
const LIGHTEST: u32 = 2;
/// Processors of the largest machine that it is made on.
const CPUS_MAX: u32 = 4;
/// Times a second that messages come, at least. A message and its answer between two sleeping
/// processors were seen to take 76 µs, and 8 between two that wait awake: 136 ms of a second.
const HEARD_MIN: u64 = 2_000;
/// Between two looks, microseconds.
const LOOK: u64 = 10_000;
/// Looks with few messages that end it.
const QUIET_MAX: u32 = 5;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

    use super::*;

    /// So many messages in the time of one look, and then the look.
    fn one_look(awake: &mut Awake, now: &mut u64, messages: u64) -> bool {
        (0..messages).for_each(|_| awake.heard());
        *now += LOOK;
        awake.look(*now);
        awake.due().is_some()
    }

    const MANY: u64 = HEARD_MIN * LOOK / 1_000_000;

    #[test]
    fn the_request_is_made_while_messages_come_often_and_ends_soon_after() {
        let device = tempfile::NamedTempFile::new().unwrap();
        let mut awake = Awake::at(Some(device.path().into()));
        let mut now = 7;
        awake.look(now);
        assert!(!one_look(&mut awake, &mut now, MANY - 1));
        assert!(one_look(&mut awake, &mut now, MANY));
        let made = std::fs::read_to_string(device.path()).unwrap();
        assert!(["0x00000000", "0x00000002"].contains(&made.as_str()), "{made}");
        device.as_file().set_len(0).unwrap();
        // A short pause does not end it, and it is not made anew.
        for _ in 1..QUIET_MAX {
            assert_eq!(awake.due(), Some(now + LOOK));
            assert!(one_look(&mut awake, &mut now, 0));
        }
        assert!(one_look(&mut awake, &mut now, MANY));
        assert_eq!(std::fs::metadata(device.path()).unwrap().len(), 0);
        for _ in 1..QUIET_MAX {
            assert!(one_look(&mut awake, &mut now, MANY - 1));
        }
        assert!(!one_look(&mut awake, &mut now, MANY - 1));
        assert!(one_look(&mut awake, &mut now, MANY));
    }

    #[test]
    fn many_messages_over_a_long_time_are_few() {
        let device = tempfile::NamedTempFile::new().unwrap();
        let mut awake = Awake::at(Some(device.path().into()));
        awake.look(1);
        (0..MANY * 2).for_each(|_| awake.heard());
        // Between two looks nothing is decided.
        awake.look(LOOK);
        assert!(awake.due().is_none());
        awake.look(1 + LOOK * 3);
        assert!(awake.due().is_none());
    }

    #[test]
    fn processors_are_counted_by_ranges() {
        assert_eq!(count("0\n"), Some(1));
        assert_eq!(count("0-1\n"), Some(2));
        assert_eq!(count("0,2-5,8"), Some(6));
        assert_eq!([count(""), count("a-3"), count("3-1")], [None; 3]);
    }

    #[test]
    fn only_small_machines_are_kept_awake_and_real_processors_may_sleep_lightly() {
        assert!(may("", "0-3") && may("1", "0"));
        assert!(!may("0", "0-1") && !may("", "0-4") && !may("", ""));
        assert_eq!((limit("haltpoll\n"), limit("intel_idle\n"), limit("")), (0, 2, 2));
    }

    #[test]
    fn who_is_refused_asks_once() {
        let folder = tempfile::tempdir().unwrap();
        let device = folder.path().join("none");
        let mut awake = Awake::at(Some(device.clone()));
        let mut now = 0;
        assert!(!one_look(&mut awake, &mut now, MANY));
        std::fs::write(&device, "").unwrap();
        assert!(!one_look(&mut awake, &mut now, MANY));
        assert!(std::fs::read(&device).unwrap().is_empty());
    }
}
