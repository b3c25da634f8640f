//! What is measured, as data: subjects, loads, and the ratios with their goals.

/// Something that serves blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Subject {
    /// Protected, the target stopped: journal only.
    Down,
    /// As `Down`, with the journal on tmpfs.
    DownTmpfs,
    /// Protected, shipping to a target on this machine.
    Replicating,
    /// `standfast serve`: a plain export.
    Serve,
    /// nbdkit's file plugin.
    NbdkitFile,
    /// nbdkit's memory plugin: the protocol's ceiling.
    NbdkitMemory,
    /// qemu-nbd with threads.
    QemuThreads,
    /// qemu-nbd with io_uring.
    QemuUring,
    /// qemu-storage-daemon mirroring, copy-mode write-blocking.
    MirrorBlocking,
    /// qemu-storage-daemon mirroring in the background.
    MirrorBackground,
    /// The file itself, libaio and O_DIRECT.
    BareDirect,
    /// The file itself, buffered pwrite and pread, one at a time.
    BareBuffered,
}

use Subject::{
    BareBuffered, BareDirect, Down, DownTmpfs, MirrorBackground, MirrorBlocking, NbdkitFile,
    NbdkitMemory, QemuThreads, QemuUring, Replicating, Serve,
};

impl Subject {
    /// Its name in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Down => "ours, target down",
            DownTmpfs => "ours, journal on tmpfs",
            Replicating => "ours, replicating",
            Serve => "standfast serve",
            NbdkitFile => "nbdkit file",
            NbdkitMemory => "nbdkit memory",
            QemuThreads => "qemu-nbd threads",
            QemuUring => "qemu-nbd io_uring",
            MirrorBlocking => "qemu mirror, write-blocking",
            MirrorBackground => "qemu mirror, background",
            BareDirect => "bare file, O_DIRECT",
            BareBuffered => "bare file, buffered",
        }
    }

    /// The programs without which it is missing.
    pub(crate) fn programs(self) -> &'static [&'static str] {
        match self {
            Down | DownTmpfs | Replicating | Serve | BareDirect | BareBuffered => &[],
            NbdkitFile | NbdkitMemory => &["nbdkit"],
            QemuThreads | QemuUring => &["qemu-nbd"],
            MirrorBlocking | MirrorBackground => &["qemu-storage-daemon", "nbdkit"],
        }
    }

    /// Whether it is a protected group of ours.
    pub(crate) fn is_site(self) -> bool {
        matches!(self, Down | DownTmpfs | Replicating)
    }
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Operations a second.
    Iops,
    /// MiB a second.
    Mib,
}

/// A load and who is put under it, interleaved.
#[derive(Debug)]
pub(crate) struct Cell {
    /// Its name.
    pub(crate) name: &'static str,
    /// What fio does.
    pub(crate) load: &'static [&'static str],
    /// What is counted.
    pub(crate) unit: Unit,
    /// Who is measured; the order is the order of a round.
    pub(crate) subjects: &'static [Subject],
    /// Journal bytes that a second of it takes at most, in MiB: journals are
    /// sized with it.
    pub(crate) journal_mib: u64,
    /// The longest run in seconds, where a journal could not be large enough.
    pub(crate) seconds_max: u64,
}

/// A ratio of medians that has goals.
#[derive(Debug)]
pub(crate) struct Ratio {
    /// The cell.
    pub(crate) cell: &'static str,
    /// Above the line.
    pub(crate) ours: Subject,
    /// Below it.
    pub(crate) peer: Subject,
    /// Floor and stretch; None: for information.
    pub(crate) goal: Option<(f64, f64)>,
}

const LONG: u64 = u64::MAX;

/// All loads.
pub(crate) const CELLS: &[Cell] = &[
    Cell {
        name: "randwrite-q1",
        load: &["--rw=randwrite", "--bs=4k", "--iodepth=1"],
        unit: Unit::Iops,
        subjects: &[
            Down,
            NbdkitFile,
            Replicating,
            Serve,
            NbdkitMemory,
            QemuThreads,
            BareDirect,
            BareBuffered,
        ],
        journal_mib: 400,
        seconds_max: LONG,
    },
    Cell {
        name: "randwrite-q16",
        load: &["--rw=randwrite", "--bs=4k", "--iodepth=16"],
        unit: Unit::Iops,
        subjects: &[
            Down,
            NbdkitFile,
            QemuThreads,
            QemuUring,
            Replicating,
            MirrorBlocking,
            MirrorBackground,
            Serve,
            NbdkitMemory,
            BareDirect,
        ],
        journal_mib: 1000,
        seconds_max: LONG,
    },
    Cell {
        name: "randwrite-fsync",
        load: &["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1"],
        unit: Unit::Iops,
        subjects: &[Down, NbdkitFile, Replicating, Serve, QemuThreads, BareDirect, BareBuffered],
        journal_mib: 200,
        seconds_max: LONG,
    },
    Cell {
        name: "randwrite-q16-fsync32",
        load: &["--rw=randwrite", "--bs=4k", "--iodepth=16", "--fsync=32"],
        unit: Unit::Iops,
        subjects: &[Down, NbdkitFile, Replicating, Serve, QemuThreads],
        journal_mib: 800,
        seconds_max: LONG,
    },
    Cell {
        name: "seqwrite-1m",
        load: &["--rw=write", "--bs=1m", "--iodepth=4"],
        unit: Unit::Mib,
        subjects: &[Down, NbdkitFile, Replicating, Serve, NbdkitMemory, QemuThreads],
        journal_mib: 3300,
        seconds_max: LONG,
    },
    Cell {
        name: "seqwrite-1m-journal-tmpfs",
        load: &["--rw=write", "--bs=1m", "--iodepth=4"],
        unit: Unit::Mib,
        subjects: &[DownTmpfs, NbdkitFile],
        journal_mib: 3300,
        seconds_max: 1,
    },
    Cell {
        name: "randread-q16",
        load: &["--rw=randread", "--bs=4k", "--iodepth=16"],
        unit: Unit::Iops,
        subjects: &[Down, NbdkitFile, Serve, NbdkitMemory, QemuThreads, BareBuffered],
        journal_mib: 0,
        seconds_max: LONG,
    },
    Cell {
        name: "seqread-1m",
        load: &["--rw=read", "--bs=1m", "--iodepth=4"],
        unit: Unit::Mib,
        subjects: &[Down, NbdkitFile, Serve, NbdkitMemory, QemuThreads, BareDirect],
        journal_mib: 0,
        seconds_max: LONG,
    },
];

const fn goal(cell: &'static str, ours: Subject, peer: Subject, floor: f64, stretch: f64) -> Ratio {
    Ratio { cell, ours, peer, goal: Some((floor, stretch)) }
}

const fn told(cell: &'static str, ours: Subject, peer: Subject) -> Ratio {
    Ratio { cell, ours, peer, goal: None }
}

/// All ratios of the table.
pub(crate) const RATIOS: &[Ratio] = &[
    goal("randwrite-q1", Down, NbdkitFile, 1.1, 1.5),
    goal("randwrite-q16", Down, NbdkitFile, 1.0, 1.3),
    goal("randwrite-q16", Down, QemuThreads, 2.5, 3.5),
    goal("randwrite-q16", Down, QemuUring, 2.5, 3.5),
    goal("randwrite-fsync", Down, NbdkitFile, 1.5, 2.2),
    goal("randwrite-q16-fsync32", Down, NbdkitFile, 2.5, 4.0),
    goal("seqwrite-1m", Down, NbdkitFile, 0.7, 0.95),
    goal("seqwrite-1m-journal-tmpfs", DownTmpfs, NbdkitFile, 0.9, 1.2),
    goal("randread-q16", Down, NbdkitFile, 1.1, 1.6),
    goal("seqread-1m", Down, NbdkitFile, 0.95, 1.2),
    goal("randwrite-q1", Replicating, Down, 0.8, 0.9),
    goal("randwrite-q16", Replicating, Down, 0.8, 0.9),
    goal("randwrite-fsync", Replicating, Down, 0.8, 0.9),
    goal("randwrite-q16-fsync32", Replicating, Down, 0.8, 0.9),
    goal("seqwrite-1m", Replicating, Down, 0.6, 0.8),
    goal("randwrite-q16", Replicating, MirrorBlocking, 3.0, 6.0),
    told("randwrite-q16", Replicating, MirrorBackground),
    told("randwrite-q16", Down, NbdkitMemory),
    told("randwrite-q1", Down, Serve),
    told("randwrite-q16", Down, Serve),
    told("randwrite-fsync", Down, Serve),
    told("seqwrite-1m", Down, Serve),
    told("randread-q16", Down, Serve),
    told("seqread-1m", Down, Serve),
    told("randwrite-q1", Serve, NbdkitFile),
    told("randwrite-q16", Serve, NbdkitFile),
];

/// Whether `subject` is in a ratio that has a goal in `cell`.
pub(crate) fn has_goal(cell: &str, subject: Subject) -> bool {
    RATIOS
        .iter()
        .any(|r| r.cell == cell && r.goal.is_some() && (r.ours == subject || r.peer == subject))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ratio_is_measured_in_its_cell() {
        for ratio in RATIOS {
            let cell = CELLS.iter().find(|cell| cell.name == ratio.cell);
            let subjects = cell.map_or(&[][..], |cell| cell.subjects);
            assert!(subjects.contains(&ratio.ours) && subjects.contains(&ratio.peer), "{ratio:?}");
        }
    }
}
