//! Recovery points: what they are called and how one is chosen. (pure)
//!
//! Owns [`Point`], the ways to name one ([`PointSpec`]) and the ordered set of a
//! group's points. Holds: points are ordered by era, then LSN; a point is
//! *usable* iff the seed of its era is complete at or below it (I14); labels
//! follow the source's clock, steps back of up to 5 minutes are clamped
//! (ruling 19). Before it: the store, which makes a point of every epoch's end.
//! After it: views. It never looks at a clock: "now" is an argument.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

use blockfilter::names::{Lsn, Name};
use jiff::{Span, SpanRelativeTo, Timestamp};

/// What made a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PointKind {
    /// The end of an epoch: as after a power cut.
    Crash,
    /// A mark made with the application's consent.
    App,
    /// A mark with a name.
    Tagged,
}

impl PointKind {
    /// The word in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Crash => "crash",
            Self::App => "app",
            Self::Tagged => "tagged",
        }
    }
}

/// A position to which the group's disks can be opened together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    /// Which seed it stands on; internal order before the LSN.
    pub era: u32,
    /// Everything below this LSN, nothing at or above it.
    pub lsn: Lsn,
    /// The incarnation that wrote its last record.
    pub incarnation: u64,
    /// The source's wall clock, microseconds since 1970, clamped (ruling 19).
    pub time_us: u64,
    /// What made it.
    pub kind: PointKind,
    /// Its tag, if it has one.
    pub tag: Option<Name>,
    /// It can be opened: the state was complete there.
    pub usable: bool,
}

impl Point {
    /// `p<incarnation>-<lsn>`.
    pub fn id(&self) -> String {
        format!("p{}-{}", self.incarnation, self.lsn)
    }
}

/// How a person names a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PointSpec {
    /// `p<incarnation>-<lsn>`.
    Id {
        /// Incarnation.
        incarnation: u64,
        /// Position.
        lsn: Lsn,
    },
    /// `latest`: the newest usable one.
    Latest,
    /// `tag:NAME`.
    Tag(Name),
    /// An RFC 3339 time, microseconds since 1970.
    At(u64),
    /// A span before now, such as `-15m`, in microseconds.
    Ago(u64),
}

impl PointSpec {
    /// Whether it names the same point for ever. The others are resolved per
    /// connection and never advertise multi-conn (ruling 17).
    pub const fn is_fixed(&self) -> bool {
        matches!(self, Self::Id { .. } | Self::Tag(_))
    }
}

/// The text names no point.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a point: use an id (p1-4096), latest, tag:NAME, an RFC 3339 time, or a span before now such as -15m"
)]
pub struct SpecError(pub String);

impl FromStr for PointSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let error = || SpecError(text.chars().take(80).collect());
        if text == "latest" {
            return Ok(Self::Latest);
        }
        if let Some(tag) = text.strip_prefix("tag:") {
            return tag.parse().map(Self::Tag).map_err(|_| error());
        }
        if let Some((incarnation, lsn)) = text.strip_prefix('p').and_then(|t| t.split_once('-')) {
            let incarnation = incarnation.parse().map_err(|_| error())?;
            return Ok(Self::Id { incarnation, lsn: Lsn(lsn.parse().map_err(|_| error())?) });
        }
        if let Some(span) = text.strip_prefix('-') {
            let span: Span = span.parse().map_err(|_| error())?;
            let days = SpanRelativeTo::days_are_24_hours();
            let duration = span.to_duration(days).map_err(|_| error())?;
            return u64::try_from(duration.as_micros()).map(Self::Ago).map_err(|_| error());
        }
        let time: Timestamp = text.parse().map_err(|_| error())?;
        u64::try_from(time.as_microsecond()).map(Self::At).map_err(|_| error())
    }
}

impl fmt::Display for PointSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id { incarnation, lsn } => write!(f, "p{incarnation}-{lsn}"),
            Self::Latest => f.write_str("latest"),
            Self::Tag(tag) => write!(f, "tag:{tag}"),
            Self::At(us) => f.write_str(&rfc3339(*us)),
            Self::Ago(us) => write!(f, "-{}s", *us as f64 / 1e6),
        }
    }
}

/// A label as RFC 3339 in UTC.
pub fn rfc3339(time_us: u64) -> String {
    let time = i64::try_from(time_us).ok().and_then(|us| Timestamp::from_microsecond(us).ok());
    time.unwrap_or(Timestamp::MAX).to_string()
}

/// Which points to list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PointQuery {
    /// Only points labelled at or after this, microseconds since 1970.
    pub since_us: Option<u64>,
    /// Only points with a tag.
    pub tagged: bool,
    /// At most this many, newest first; None: all.
    pub limit: Option<usize>,
}

/// Why no point could be chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PointError {
    /// Nothing matches.
    #[error("there is no point {0}")]
    Missing(PointSpec),
    /// It exists but lies inside an unfinished copy.
    #[error("point {0} is not usable: the copy of the disks was not complete there")]
    Unusable(String),
    /// There is none at all yet.
    #[error("there is no usable point yet: the first copy of the disks is not complete")]
    None,
}

/// Where eras start to be usable; asked by [`PointSet`] for each point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EraEnd {
    /// The era.
    pub era: u32,
    /// Points at or above are usable; None: the seed is not complete.
    pub end: Option<Lsn>,
}

/// One point as kept in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PointRec {
    pub(crate) era: u32,
    pub(crate) lsn: u64,
    pub(crate) incarnation: u64,
    pub(crate) time_us: u64,
    pub(crate) kind: PointKind,
}

/// All points of a group, oldest first.
#[derive(Clone, Debug, Default)]
pub(crate) struct PointSet {
    points: Vec<PointRec>,
    /// Tags by position; few points have one.
    tags: HashMap<(u32, u64), Name>,
    eras: Vec<EraEnd>,
}

impl PointSet {
    /// Replaces what is known of the eras; points of eras that are gone go too.
    pub(crate) fn set_eras(&mut self, eras: Vec<EraEnd>) {
        self.eras = eras;
        let known = &self.eras;
        let kept = |era: u32| known.iter().any(|e| e.era == era);
        self.points.retain(|p| kept(p.era));
        self.tags.retain(|(era, _), _| kept(*era));
    }

    /// Adds a point above all others. One at the same position is replaced.
    pub(crate) fn push(&mut self, rec: PointRec, tag: Option<Name>) {
        if let Some(last) = self.points.last() {
            assert!((last.era, last.lsn) <= (rec.era, rec.lsn), "points are pushed in order");
            if (last.era, last.lsn) == (rec.era, rec.lsn) {
                self.points.pop();
            }
        }
        self.points.push(rec);
        if let Some(tag) = tag {
            self.tags.insert((rec.era, rec.lsn), tag);
        }
    }

    /// The label of the newest point, for clamping the next.
    pub(crate) fn last_time(&self) -> Option<u64> {
        self.points.last().map(|p| p.time_us)
    }

    fn usable(&self, rec: &PointRec) -> bool {
        let era = self.eras.iter().rev().find(|e| e.era == rec.era);
        era.and_then(|e| e.end).is_some_and(|end| rec.lsn >= end.0)
    }

    fn full(&self, rec: &PointRec) -> Point {
        Point {
            era: rec.era,
            lsn: Lsn(rec.lsn),
            incarnation: rec.incarnation,
            time_us: rec.time_us,
            kind: rec.kind,
            tag: self.tags.get(&(rec.era, rec.lsn)).cloned(),
            usable: self.usable(rec),
        }
    }

    /// The point at a position.
    pub(crate) fn at(&self, era: u32, lsn: Lsn) -> Option<Point> {
        let wanted = (era, lsn.0);
        let i = self.points.binary_search_by(|p| (p.era, p.lsn).cmp(&wanted)).ok()?;
        Some(self.full(&self.points[i]))
    }

    /// Whether the point still exists and is usable.
    pub(crate) fn check(&self, point: &Point) -> Result<(), PointError> {
        let id = PointSpec::Id { incarnation: point.incarnation, lsn: point.lsn };
        let here = self.at(point.era, point.lsn).ok_or(PointError::Missing(id))?;
        if here.usable { Ok(()) } else { Err(PointError::Unusable(here.id())) }
    }

    /// Points, newest first.
    pub(crate) fn list(&self, query: PointQuery) -> Vec<Point> {
        let wanted = |p: &&PointRec| {
            query.since_us.is_none_or(|since| p.time_us >= since)
                && (!query.tagged || self.tags.contains_key(&(p.era, p.lsn)))
        };
        let limit = query.limit.unwrap_or(usize::MAX);
        self.points.iter().rev().filter(wanted).take(limit).map(|p| self.full(p)).collect()
    }

    /// The oldest usable point.
    pub(crate) fn oldest(&self) -> Option<Point> {
        self.points.iter().find(|p| self.usable(p)).map(|p| self.full(p))
    }

    /// The newest usable point.
    pub(crate) fn newest(&self) -> Option<Point> {
        self.points.iter().rev().find(|p| self.usable(p)).map(|p| self.full(p))
    }

    /// How many there are, usable or not.
    pub(crate) fn len(&self) -> usize {
        self.points.len()
    }

    /// All tags.
    pub(crate) fn tags(&self) -> Vec<Name> {
        let mut tags: Vec<Name> = self.tags.values().cloned().collect();
        tags.sort();
        tags
    }

    /// Chooses the point that `spec` names.
    pub(crate) fn resolve(&self, spec: &PointSpec, now_us: u64) -> Result<Point, PointError> {
        let newest = self.newest().ok_or(PointError::None)?;
        let missing = || PointError::Missing(spec.clone());
        let named = |wanted: &dyn Fn(&&PointRec) -> bool| {
            let mut found = self.points.iter().rev().filter(wanted).peekable();
            let newest = *found.peek().ok_or_else(missing)?;
            // After a journal was made anew an id may come twice.
            let point = self.full(found.find(|p| self.usable(p)).unwrap_or(newest));
            if point.usable { Ok(point) } else { Err(PointError::Unusable(point.id())) }
        };
        let at = |time_us: u64| {
            let wanted = |p: &&PointRec| p.time_us <= time_us && self.usable(p);
            self.points.iter().rev().find(wanted).map(|p| self.full(p)).ok_or_else(missing)
        };
        match spec {
            PointSpec::Latest => Ok(newest),
            PointSpec::Id { incarnation, lsn } => {
                named(&|p| p.incarnation == *incarnation && p.lsn == lsn.0)
            }
            PointSpec::Tag(tag) => named(&|p| self.tags.get(&(p.era, p.lsn)) == Some(tag)),
            PointSpec::At(us) => at(*us),
            PointSpec::Ago(us) => at(now_us.saturating_sub(*us)),
        }
    }
}

/// The label of a point: the source's clock, never back by 5 minutes or less. An
/// epoch of padding only may bring no time (0); it takes that of the point before.
pub(crate) fn label(wall_us: u64, last: Option<u64>) -> u64 {
    match last {
        Some(last) if wall_us == 0 => last,
        Some(last) if wall_us < last && last - wall_us <= CLAMP_US => last,
        _ => wall_us,
    }
}

/// Steps back of up to this much are clamped.
const CLAMP_US: u64 = 5 * 60 * 1_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn set() -> PointSet {
        let mut set = PointSet::default();
        set.set_eras(vec![EraEnd { era: 1, end: Some(Lsn(20)) }, EraEnd { era: 2, end: None }]);
        let rec = |era, lsn, time_us| PointRec {
            era,
            lsn,
            incarnation: 7,
            time_us,
            kind: PointKind::Crash,
        };
        set.push(rec(1, 10, 100), None);
        set.push(rec(1, 20, 200), "a".parse().ok());
        set.push(rec(1, 30, 300), None);
        set.push(rec(2, 5, 400), "b".parse().ok());
        set
    }

    #[test]
    fn every_way_to_name_a_point_is_understood() {
        let parse = |text: &str| text.parse::<PointSpec>();
        assert_eq!(parse("p3-4096"), Ok(PointSpec::Id { incarnation: 3, lsn: Lsn(4096) }));
        assert_eq!(parse("latest"), Ok(PointSpec::Latest));
        assert_eq!(parse("tag:x-1"), Ok(PointSpec::Tag("x-1".parse().unwrap())));
        assert_eq!(parse("-15m"), Ok(PointSpec::Ago(900_000_000)));
        assert_eq!(parse("-2d"), Ok(PointSpec::Ago(2 * 86_400_000_000)));
        assert_eq!(parse("-1h30m"), Ok(PointSpec::Ago(5_400_000_000)));
        assert_eq!(parse("1970-01-01T00:00:01Z"), Ok(PointSpec::At(1_000_000)));
        assert_eq!(parse("1970-01-01T02:00:01+02:00"), Ok(PointSpec::At(1_000_000)));
        for bad in ["", "p", "p1", "p1-x", "tag:", "tag:A", "-", "-x", "yesterday", "--5m"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn points_inside_a_seed_are_listed_but_not_offered() {
        let set = set();
        let usable: Vec<bool> = set.list(PointQuery::default()).iter().map(|p| p.usable).collect();
        assert_eq!(usable, [false, true, true, false]);
        assert_eq!(set.newest().unwrap().lsn, Lsn(30));
        assert_eq!(set.oldest().unwrap().lsn, Lsn(20));
        let by = |text: &str| set.resolve(&text.parse().unwrap(), 1000).map(|p| p.lsn.0);
        assert_eq!(by("latest"), Ok(30));
        assert_eq!(by("p7-20"), Ok(20));
        assert_eq!(by("tag:a"), Ok(20));
        assert!(matches!(by("tag:b"), Err(PointError::Unusable(_))));
        assert!(matches!(by("p7-10"), Err(PointError::Unusable(_))));
        assert!(matches!(by("p7-11"), Err(PointError::Missing(_))));
        assert_eq!(set.resolve(&PointSpec::At(299), 0).unwrap().lsn, Lsn(20));
        assert_eq!(set.resolve(&PointSpec::At(9999), 0).unwrap().lsn, Lsn(30));
        assert_eq!(set.resolve(&PointSpec::Ago(100), 300).unwrap().lsn, Lsn(20));
        assert!(set.resolve(&PointSpec::At(199), 0).is_err());
    }

    #[test]
    fn small_steps_back_of_the_clock_are_clamped_and_large_ones_followed() {
        assert_eq!(label(5, None), 5);
        assert_eq!(label(0, Some(1 << 50)), 1 << 50);
        assert_eq!(label(1_000_000_000, Some(1_000_000_001)), 1_000_000_001);
        assert_eq!(label(1_000_000_000, Some(1_000_000_000 + CLAMP_US + 1)), 1_000_000_000);
    }

    #[test]
    fn points_of_a_dropped_era_are_gone() {
        let mut set = set();
        set.set_eras(vec![EraEnd { era: 1, end: Some(Lsn(20)) }]);
        assert_eq!(set.len(), 3);
        assert_eq!(set.tags(), ["a".parse().unwrap()]);
    }
}
