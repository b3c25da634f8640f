//! Sizes and durations as people write them, and the journal's plan. (pure)
//!
//! Every value has limits, and zero and overflow are refused with a sentence
//! that says what is accepted.

use std::time::Duration;

/// Parses `4GiB`, `512M`, `4096`; units are powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is not a size: try 4GiB"))?;
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(format!("{unit:?} is not a unit of size: use KiB, MiB, GiB or TiB")),
    };
    number
        .checked_mul(1 << shift)
        .filter(|n| *n <= SIZE_MAX)
        .ok_or_else(|| format!("{text} is too large: at most {}", show_bytes(SIZE_MAX)))
}

/// Parses `60s`, `500ms`, `15m`, `1h`, `2d`, or plain seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| format!("{text:?} is not a duration: try 60s"))?;
    let factor = match unit.trim() {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return Err(format!("{unit:?} is not a unit of time: use ms, s, m, h or d")),
    };
    let seconds = number * factor;
    if !(0.0..=DURATION_MAX_S).contains(&seconds) {
        return Err(format!("{text} is out of range: at most 366d"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// `1.5 GiB`.
pub fn show_bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value.fract() < 0.05 {
        format!("{value:.0} {}", units[unit])
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

/// `1.2 s`, `3 min 20 s`.
pub fn show_seconds(seconds: f64) -> String {
    if seconds < 0.0995 {
        format!("{:.0} ms", seconds * 1000.0)
    } else if seconds < 60.0 {
        format!("{seconds:.1} s")
    } else if seconds < 3600.0 {
        format!("{:.0} min {:.0} s", (seconds / 60.0).floor(), seconds % 60.0)
    } else {
        format!("{:.0} h {:.0} min", (seconds / 3600.0).floor(), (seconds % 3600.0) / 60.0)
    }
}

/// How a journal file is cut up, and how large the arena is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalPlan {
    /// The journal file's size: two superblocks' area and whole chunks.
    pub journal_bytes: u64,
    /// Chunk size: a power of two, 1 to 64 MiB.
    pub chunk_bytes: u64,
    /// Arena size: whole chunks, at least two.
    pub arena_bytes: u64,
}

/// Chooses the largest chunk that leaves at least 16 of them (never fewer than
/// 4), and an arena of at most half the journal.
pub fn plan_journal(journal: u64, arena: u64) -> Result<JournalPlan, String> {
    if journal < JOURNAL_MIN {
        return Err(format!(
            "a journal of {} is too small: at least {}",
            show_bytes(journal),
            show_bytes(JOURNAL_MIN)
        ));
    }
    let room = journal - JOURNAL_HEAD;
    let mut chunk = CHUNK_MAX;
    while chunk > CHUNK_MIN && room / chunk < 16 {
        chunk /= 2;
    }
    let chunks = room / chunk;
    let arena_chunks = (arena / chunk).min(chunks / 2).max(2);
    Ok(JournalPlan {
        journal_bytes: JOURNAL_HEAD + chunks * chunk,
        chunk_bytes: chunk,
        arena_bytes: arena_chunks * chunk,
    })
}

/// Bytes of a journal file before its first chunk.
pub const JOURNAL_HEAD: u64 = 2 << 20;
/// Smallest journal: four chunks of 1 MiB.
pub const JOURNAL_MIN: u64 = JOURNAL_HEAD + 4 * CHUNK_MIN;
/// Largest chunk.
pub const CHUNK_MAX: u64 = 64 << 20;
/// Smallest chunk.
pub const CHUNK_MIN: u64 = 1 << 20;
/// Largest size that is accepted anywhere.
pub const SIZE_MAX: u64 = 1 << 50;
const DURATION_MAX_S: f64 = 366.0 * 86400.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_have_units_and_limits() {
        assert_eq!(parse_size("4GiB"), Ok(4 << 30));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("64 m"), Ok(64 << 20));
        for bad in ["", "GiB", "-1", "1.5GiB", "1XB", "99999999TiB", "99999999999999999999"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for bad in ["", "s", "-1s", "1y", "999999999d", "1.2.3s"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_journal_of_any_accepted_size_has_at_least_four_chunks_and_a_fitting_arena() {
        for mib in (6..200).chain([1024, 4096, 100 << 10]) {
            let plan = plan_journal(mib << 20, 256 << 20).unwrap();
            let chunks = (plan.journal_bytes - JOURNAL_HEAD) / plan.chunk_bytes;
            assert!(chunks >= 4 && plan.journal_bytes <= mib << 20, "{mib}: {plan:?}");
            assert!(chunks >= 16 || plan.chunk_bytes == CHUNK_MIN, "{mib}: {plan:?}");
            assert!(plan.arena_bytes >= 2 * plan.chunk_bytes, "{mib}: {plan:?}");
            assert!(plan.arena_bytes <= plan.journal_bytes - JOURNAL_HEAD, "{mib}: {plan:?}");
            assert!(plan.arena_bytes.is_multiple_of(plan.chunk_bytes), "{mib}: {plan:?}");
        }
        assert!(plan_journal(5 << 20, 1 << 20).is_err());
    }

    #[test]
    fn amounts_read_well() {
        assert_eq!(show_bytes(0), "0 B");
        assert_eq!(show_bytes(1536), "1.5 KiB");
        assert_eq!(show_bytes(4 << 30), "4 GiB");
        assert_eq!(show_seconds(0.012), "12 ms");
        assert_eq!(show_seconds(200.0), "3 min 20 s");
    }
}
