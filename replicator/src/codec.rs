//! Which compression, by what is the bottleneck. (pure but for zstd)
//!
//! Owns the choice and the compressor. Holds: nothing is ever sent larger than
//! it is; a network that never makes us wait is never paid for with CPU time
//! (loopback: `none`, at once); a level is left only for one that is clearly
//! better and after it was held for a second. Measured time is an argument.

use std::borrow::Cow;
use std::io;

use zstd::bulk::Compressor;

/// A level of compression.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it is.
    None,
    /// zstd --fast=5.
    Fast,
    /// zstd -1.
    Normal,
    /// zstd -3.
    High,
}

impl Level {
    const ALL: [Self; 4] = [Self::None, Self::Fast, Self::Normal, Self::High];

    /// For status.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Fast => "zstd-fast5",
            Self::Normal => "zstd-1",
            Self::High => "zstd-3",
        }
    }

    const fn zstd(self) -> i32 {
        match self {
            Self::None | Self::Fast => -5,
            Self::Normal => 1,
            Self::High => 3,
        }
    }

    /// Payload bytes of one frame: compressed ones are opened whole for a read.
    pub const fn frame_bytes(self) -> usize {
        match self {
            Self::None => 256 << 10,
            Self::Fast | Self::Normal => 64 << 10,
            Self::High => 128 << 10,
        }
    }
}

/// Cost of one level: nanoseconds of CPU and encoded bytes, per byte.
#[derive(Clone, Copy, Debug)]
struct Cost {
    cpu: f64,
    size: f64,
}

/// Chooses the level.
#[derive(Clone, Debug)]
pub struct Controller {
    level: Level,
    costs: [Cost; 4],
    /// Nanoseconds per byte of the network when it was the bottleneck; 0: never was.
    net: f64,
    changed_us: u64,
    window: Window,
    pinned: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Window {
    since_us: u64,
    raw: u64,
    sent: u64,
    blocked_us: u64,
}

impl Default for Controller {
    fn default() -> Self {
        // First guesses, from binaries of /usr on one 2.6 GHz core.
        let costs = [(0.3, 1.0), (2.0, 0.45), (3.2, 0.33), (4.5, 0.29)];
        Self {
            level: Level::None,
            costs: costs.map(|(cpu, size)| Cost { cpu, size }),
            net: 0.0,
            changed_us: 0,
            window: Window::default(),
            pinned: false,
        }
    }
}

impl Controller {
    /// Never compresses: for a peer on this machine, where a wait is for its
    /// disk or the CPU, never for a network.
    pub fn uncompressed() -> Self {
        Self { pinned: true, ..Self::default() }
    }

    /// The level for the next frame.
    pub fn level(&self) -> Level {
        self.level
    }

    /// A frame of `raw` bytes became `encoded` bytes in `cpu_us`.
    pub fn encoded(&mut self, level: Level, raw: usize, encoded: usize, cpu_us: u64) {
        self.window.raw += raw as u64;
        if raw < 4096 || level == Level::None {
            return;
        }
        let cost = &mut self.costs[level as usize];
        cost.cpu = cost.cpu * 0.9 + (cpu_us as f64 * 1e3 / raw as f64) * 0.1;
        cost.size = cost.size * 0.9 + (encoded as f64 / raw as f64) * 0.1;
    }

    /// Tells what the connection did so far: bytes taken by the socket and time
    /// spent waiting for it (totals of the session). Decides once a window.
    pub fn observe(&mut self, sent: u64, blocked_us: u64, now_us: u64) {
        let began = self.window;
        if began.since_us == 0 || sent < began.sent {
            self.window = Window { since_us: now_us, raw: 0, sent, blocked_us };
            return;
        }
        let elapsed = now_us.saturating_sub(began.since_us);
        if elapsed < WINDOW_US {
            return;
        }
        self.window = Window { since_us: now_us, raw: 0, sent, blocked_us };
        let moved = sent - began.sent;
        let waiting = blocked_us.saturating_sub(began.blocked_us) as f64 / elapsed as f64;
        if waiting >= 0.3 && moved > 0 {
            let net = elapsed as f64 * 1e3 / moved as f64;
            self.net = if self.net == 0.0 { net } else { self.net * 0.5 + net * 0.5 };
            self.choose(now_us);
        } else if waiting < 0.1 && self.level != Level::None {
            // Would it fit uncompressed by now?
            let demand = elapsed as f64 * 1e3 / began.raw.max(1) as f64;
            if demand * 0.8 > self.net {
                self.switch(Level::None, now_us);
            }
        }
    }

    fn score(&self, level: Level) -> f64 {
        let cost = self.costs[level as usize];
        cost.cpu.max(cost.size * self.net)
    }

    fn choose(&mut self, now_us: u64) {
        if self.pinned {
            return;
        }
        let best = Level::ALL
            .into_iter()
            .min_by(|a, b| self.score(*a).total_cmp(&self.score(*b)))
            .unwrap_or(Level::None);
        if self.score(best) < self.score(self.level) * 0.85 {
            self.switch(best, now_us);
        }
    }

    fn switch(&mut self, level: Level, now_us: u64) {
        if now_us.saturating_sub(self.changed_us) >= HOLD_US || self.changed_us == 0 {
            self.level = level;
            self.changed_us = now_us;
        }
    }
}

/// Compresses payloads; keeps its tables between frames.
pub struct Encoder {
    compressor: Compressor<'static>,
    level: Level,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").field("level", &self.level).finish_non_exhaustive()
    }
}

impl Encoder {
    /// A new one.
    pub fn new() -> io::Result<Self> {
        let level = Level::Fast;
        Ok(Self { compressor: Compressor::new(level.zstd())?, level })
    }

    /// `raw` compressed, or None where it is not worth it.
    pub fn encode(
        &mut self,
        level: Level,
        raw: &[impl AsRef<[u8]>],
    ) -> io::Result<Option<Vec<u8>>> {
        if level == Level::None {
            return Ok(None);
        }
        let raw = match raw {
            [one] => Cow::Borrowed(one.as_ref()),
            many => {
                let len = many.iter().map(|piece| piece.as_ref().len()).sum();
                let mut all = Vec::with_capacity(len);
                many.iter().for_each(|piece| all.extend_from_slice(piece.as_ref()));
                Cow::Owned(all)
            }
        };
        if raw.len() < SMALLEST {
            return Ok(None);
        }
        if self.level != level {
            self.compressor.set_compression_level(level.zstd())?;
            self.level = level;
        }
        if raw.len() > 4 * PROBE {
            let middle = raw.len() / 2;
            let probe = self.compressor.compress(&raw[middle..middle + PROBE])?;
            if probe.len() > PROBE * 15 / 16 {
                return Ok(None);
            }
        }
        let packed = self.compressor.compress(&raw)?;
        Ok((packed.len() < raw.len() - raw.len() / 16).then_some(packed))
    }
}

const WINDOW_US: u64 = 200_000;
const HOLD_US: u64 = 1_000_000;
const PROBE: usize = 4096;
const SMALLEST: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs 20 s of a network of `net` ns/byte under a source that always has
    /// data; returns the level at the end and the number of changes.
    fn run(net: f64, idle: f64) -> (Level, u32) {
        let mut controller = Controller::default();
        let (mut now, mut sent, mut blocked, mut changes) = (1_000.0, 0.0, 0.0, 0);
        while now < 20e6 {
            let before = controller.level();
            let raw = 256.0 * 1024.0;
            let cost = Controller::default().costs[before as usize];
            let (cpu, wire) = (raw * cost.cpu / 1e3, raw * cost.size * net / 1e3);
            let wait = (wire - cpu).max(0.0);
            now += cpu + wait + idle;
            sent += raw * cost.size;
            blocked += wait;
            controller.encoded(before, raw as usize, (raw * cost.size) as usize, cpu as u64);
            controller.observe(sent as u64, blocked as u64, now as u64);
            changes += u32::from(controller.level() != before);
        }
        (controller.level(), changes)
    }

    #[test]
    fn loopback_stays_uncompressed() {
        assert_eq!(run(0.2, 0.0), (Level::None, 0));
    }

    #[test]
    fn a_slow_peer_on_this_machine_is_not_a_slow_network() {
        let mut controller = Controller::uncompressed();
        for step in 1..100 {
            controller.observe(step * 1000, step * 290_000, step * 300_000);
        }
        assert_eq!(controller.level(), Level::None);
    }

    #[test]
    fn a_slow_network_is_compressed_without_flapping() {
        let (level, changes) = run(80.0, 0.0);
        assert_eq!(level, Level::High);
        assert!(changes <= 3, "{changes}");
        let (level, changes) = run(8.0, 0.0);
        assert!(matches!(level, Level::Fast | Level::Normal), "{level:?}");
        assert!(changes <= 3, "{changes}");
    }

    #[test]
    fn an_idle_source_on_a_slow_network_is_not_compressed() {
        assert_eq!(run(8.0, 50_000.0).0, Level::None);
    }

    #[test]
    fn data_that_does_not_compress_is_stored() {
        let mut encoder = Encoder::new().unwrap();
        let mut x = 1u64;
        let noise: Vec<u8> = (0..65536)
            .map(|_| {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (x >> 56) as u8
            })
            .collect();
        assert_eq!(encoder.encode(Level::Normal, &[&noise]).unwrap(), None);
        let text = b"the same again and again ".repeat(4000);
        let packed = encoder.encode(Level::Fast, &[&text]).unwrap().unwrap();
        assert!(packed.len() < text.len() / 10);
    }
}
