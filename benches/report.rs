//! What was measured, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use serde::Serialize;

use crate::Options;
use crate::cells::{Cell, RATIOS, Subject, Unit};
use crate::stats::{median, spread};
use crate::sys;

/// One run.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Sample {
    /// In the row's unit.
    pub(crate) value: f64,
    /// CPU microseconds an operation: client, server (with its roles), kernel threads.
    pub(crate) cpu_us_per_op: BTreeMap<String, f64>,
    /// Ours: not yet at the target when the load ended.
    pub(crate) backlog_bytes: f64,
    /// Ours: until it was.
    pub(crate) drain_seconds: f64,
}

/// All runs of one subject in one cell.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) cell: &'static str,
    #[serde(skip)]
    pub(crate) subject: Subject,
    #[serde(rename = "subject")]
    name: &'static str,
    unit: &'static str,
    pub(crate) samples: Vec<Sample>,
    /// The program that is not installed.
    pub(crate) missing: Option<String>,
    /// Why a run failed.
    pub(crate) error: Option<String>,
}

impl Row {
    /// Nothing measured yet.
    pub(crate) fn new(cell: &Cell, subject: Subject) -> Self {
        let unit = if cell.unit == Unit::Iops { "IOPS" } else { "MiB/s" };
        let (samples, missing, error) = Default::default();
        Self { cell: cell.name, subject, name: subject.name(), unit, samples, missing, error }
    }

    fn values(&self) -> Vec<f64> {
        self.samples.iter().map(|sample| sample.value).collect()
    }

    /// The median; None unless every run was measured.
    pub(crate) fn median(&self) -> Option<f64> {
        if self.error.is_some() { None } else { median(&self.values()) }
    }

    fn cpu(&self, role: &str) -> Option<f64> {
        let of = |sample: &Sample| sample.cpu_us_per_op.get(role).copied();
        median(&self.samples.iter().filter_map(of).collect::<Vec<_>>())
    }

    fn line(&self) -> Vec<String> {
        let mut line = vec![self.cell.to_owned(), self.name.to_owned()];
        match (&self.missing, &self.error, spread(&self.values())) {
            (Some(program), ..) => line.push(format!("no {program}")),
            (_, Some(error), _) => line.push(format!("ERROR: {error}")),
            (_, _, Some((low, high))) => {
                let value = median(&self.values()).unwrap_or(0.0);
                line.push(format!("{} {}", number(value), self.unit));
                line.push(format!("{}-{}", number(low), number(high)));
                for role in ["client", "server", "kernel"] {
                    line.push(self.cpu(role).map_or_else(String::new, |us| format!("{us:.1}")));
                }
                line.push(self.roles());
            }
            _ => line.push("not measured".into()),
        }
        line
    }

    /// The server's CPU by role, where there are several.
    fn roles(&self) -> String {
        let Some(sample) = self.samples.first() else { return String::new() };
        let all = ["client", "server", "kernel"];
        let own: Vec<&String> =
            sample.cpu_us_per_op.keys().filter(|role| !all.contains(&role.as_str())).collect();
        if own.len() < 2 {
            return String::new();
        }
        let text = own.iter().map(|r| format!("{r} {:.1}", self.cpu(r).unwrap_or(0.0)));
        text.collect::<Vec<_>>().join(", ")
    }
}

/// What a figure should reach.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Goal {
    pub(crate) floor: f64,
    pub(crate) stretch: f64,
    /// Smaller is better.
    pub(crate) at_most: bool,
}

/// One figure of the table: a ratio, or what a special cell found.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    pub(crate) cell: &'static str,
    pub(crate) title: String,
    /// None: not measured, `note` says why.
    pub(crate) value: Option<f64>,
    pub(crate) low: Option<f64>,
    pub(crate) high: Option<f64>,
    /// `x` for a ratio.
    pub(crate) unit: &'static str,
    pub(crate) goal: Option<Goal>,
    pub(crate) note: String,
    /// It should have been measured and was not.
    pub(crate) failed: bool,
}

impl Figure {
    /// The median of `values` with their spread.
    pub(crate) fn of(cell: &'static str, title: &str, values: &[f64], unit: &'static str) -> Self {
        Self {
            cell,
            title: title.to_owned(),
            value: median(values),
            low: spread(values).map(|(low, _)| low),
            high: spread(values).map(|(_, high)| high),
            unit,
            goal: None,
            note: String::new(),
            failed: false,
        }
    }

    /// Not measured, because.
    pub(crate) fn none(cell: &'static str, title: &str, note: String, failed: bool) -> Self {
        Self { note, failed, ..Self::of(cell, title, &[], "") }
    }

    /// At least `floor`.
    pub(crate) fn at_least(self, floor: f64, stretch: f64) -> Self {
        Self { goal: Some(Goal { floor, stretch, at_most: false }), ..self }
    }

    /// At most `floor`.
    pub(crate) fn at_most(self, floor: f64, stretch: f64) -> Self {
        Self { goal: Some(Goal { floor, stretch, at_most: true }), ..self }
    }

    /// With words.
    pub(crate) fn note(self, note: impl Into<String>) -> Self {
        Self { note: note.into(), ..self }
    }

    /// `stretch`, `floor`, `below`; nothing without a goal or a value.
    pub(crate) fn verdict(&self) -> &'static str {
        let (Some(value), Some(goal)) = (self.value, self.goal) else { return "" };
        let reached = |limit: f64| if goal.at_most { value <= limit } else { value >= limit };
        if reached(goal.stretch) {
            "stretch"
        } else if reached(goal.floor) {
            "floor"
        } else {
            "BELOW"
        }
    }

    fn line(&self) -> Vec<String> {
        let show =
            |value: f64| if self.unit == "x" { format!("{value:.2}") } else { number(value) };
        let mut line = vec![self.title.clone()];
        match self.value {
            Some(value) => line.push(format!("{} {}", show(value), self.unit)),
            None if self.failed => line.push("ERROR".into()),
            None => line.push("-".into()),
        }
        let spread = self.low.zip(self.high);
        line.push(spread.map_or_else(String::new, |(l, h)| format!("{}-{}", show(l), show(h))));
        let goal = self.goal.map(|goal| {
            let sign = if goal.at_most { "<= " } else { "" };
            [format!("{sign}{}", goal.floor), format!("{sign}{}", goal.stretch)]
        });
        line.extend(goal.unwrap_or_default());
        line.push(self.verdict().into());
        line.push(self.note.clone());
        line
    }
}

/// The whole result.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: BTreeMap<&'static str, String>,
    pub(crate) versions: BTreeMap<&'static str, String>,
    pub(crate) options: Options,
    pub(crate) rows: Vec<Row>,
    pub(crate) figures: Vec<Figure>,
}

impl Report {
    /// Of this machine, nothing measured yet.
    pub(crate) fn new(options: &Options, dir: &Path) -> Self {
        let (rows, figures) = Default::default();
        Self {
            machine: machine(dir),
            versions: versions(),
            options: options.clone(),
            rows,
            figures,
        }
    }

    /// The row of a subject.
    pub(crate) fn row(&self, cell: &str, subject: Subject) -> Option<&Row> {
        self.rows.iter().find(|row| row.cell == cell && row.subject == subject)
    }

    /// Makes the ratios of all cells that were measured; they come first.
    pub(crate) fn ratios(&mut self) {
        let mut made = Vec::new();
        for ratio in RATIOS {
            let rows = self.row(ratio.cell, ratio.ours).zip(self.row(ratio.cell, ratio.peer));
            let Some((ours, peer)) = rows else { continue };
            let title = format!("{}: {} / {}", ratio.cell, ratio.ours.name(), ratio.peer.name());
            let missing = [ours, peer].into_iter().find_map(|row| row.missing.as_ref());
            let figure = match (missing, ours.median(), peer.median()) {
                (Some(program), ..) => {
                    Figure::none(ratio.cell, &title, format!("no {program}"), false)
                }
                (_, Some(a), Some(b)) => {
                    let pairs = ours.values().into_iter().zip(peer.values());
                    let pairs: Vec<f64> = pairs.map(|(a, b)| a / b).collect();
                    Figure { value: Some(a / b), ..Figure::of(ratio.cell, &title, &pairs, "x") }
                }
                _ => Figure::none(ratio.cell, &title, "a run failed".into(), true),
            };
            made.push(match ratio.goal {
                Some((floor, stretch)) => figure.at_least(floor, stretch),
                None => figure,
            });
        }
        made.extend(self.backlog());
        made.append(&mut self.figures);
        self.figures = made;
    }

    /// What each load leaves for the line to catch up with: without it a rate while replicating says
    /// nothing of the copy.
    fn backlog(&self) -> Vec<Figure> {
        let of = |row: &Row| {
            let cell = row.cell;
            let mib: Vec<f64> =
                row.samples.iter().map(|s| s.backlog_bytes / f64::from(1 << 20)).collect();
            let seconds: Vec<f64> = row.samples.iter().map(|s| s.drain_seconds).collect();
            let title = |what| format!("{cell}, replicating: {what}");
            [
                Figure::of(cell, &title("backlog at its end"), &mib, "MiB"),
                Figure::of(cell, &title("until it is drained"), &seconds, "s"),
            ]
        };
        let rows = self.rows.iter().filter(|row| {
            row.subject == Subject::Replicating && row.error.is_none() && !row.samples.is_empty()
        });
        rows.flat_map(of).collect()
    }

    /// Whether nothing that could be measured failed.
    pub(crate) fn complete(&self) -> bool {
        self.rows.iter().all(|row| row.error.is_none()) && !self.figures.iter().any(|f| f.failed)
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        let header = ["cell", "subject", "median", "spread", "client", "server", "kernel", "of it"];
        let rows: Vec<Vec<String>> = self.rows.iter().map(Row::line).collect();
        let _ = writeln!(text, "\nCPU columns: microseconds an operation\n");
        text.push_str(&table(&header, &rows));
        let header = ["figure", "value", "spread", "floor", "stretch", "reached", "note"];
        let rows: Vec<Vec<String>> = self.figures.iter().map(Figure::line).collect();
        let _ = writeln!(text);
        text.push_str(&table(&header, &rows));
        if !self.options.publishable {
            let why = if self.options.quick { "quick" } else { "fewer than 5 rounds" };
            let _ = writeln!(text, "\n{why}: not for publishing");
        }
        text
    }
}

/// Left-aligned columns; an over-long last cell does not widen its column.
fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let header: Vec<String> = header.iter().map(|&name| name.to_owned()).collect();
    let all: Vec<&Vec<String>> = std::iter::once(&header).chain(rows).collect();
    let width = |column: usize| {
        let cells = all.iter().filter(|row| row.len() > column + 1);
        cells.map(|row| row[column].chars().count()).max().unwrap_or(0)
    };
    let mut text = String::new();
    for row in &all {
        let cells = row.iter().enumerate().map(|(at, cell)| format!("{cell:0$}", width(at)));
        let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    text
}

fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 1.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

fn machine(dir: &Path) -> BTreeMap<&'static str, String> {
    let file = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = file("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("unknown", |text| text.trim_start_matches([' ', '\t', ':']));
    let memory = file("/proc/meminfo").lines().next().unwrap_or_default().to_owned();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    BTreeMap::from([
        ("cpu", model.to_owned()),
        ("cores", cores.to_string()),
        ("memory", memory),
        ("kernel", file("/proc/sys/kernel/osrelease").trim().to_owned()),
        ("file system", first_line("stat", &["-f", "-c", "%T", &dir.display().to_string()])),
    ])
}

fn versions() -> BTreeMap<&'static str, String> {
    let asked =
        ["fio", "nbdkit", "qemu-nbd", "qemu-storage-daemon", "nbdcopy", "qemu-img", "rsync"];
    let mut all: BTreeMap<&'static str, String> = asked
        .into_iter()
        .filter(|program| sys::has(program))
        .map(|program| (program, first_line(program, &["--version"])))
        .collect();
    all.insert("standfast commit", first_line("git", &["describe", "--always", "--dirty"]));
    all
}

fn first_line(program: &str, arguments: &[&str]) -> String {
    let text = sys::output(Command::new(program).args(arguments)).unwrap_or_default();
    text.lines().next().unwrap_or("unknown").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_says_which_goal_is_reached() {
        let at = |value| Figure::of("c", "t", &[value], "x");
        assert_eq!(at(1.0).at_least(1.1, 1.5).verdict(), "BELOW");
        assert_eq!(at(1.1).at_least(1.1, 1.5).verdict(), "floor");
        assert_eq!(at(1.0).at_most(1.2, 0.8).verdict(), "floor");
        assert_eq!(at(0.7).at_most(1.2, 0.8).verdict(), "stretch");
        assert_eq!(Figure::none("c", "t", String::new(), false).at_least(1.0, 2.0).verdict(), "");
    }
}
