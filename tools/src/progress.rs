//! Progress of long work, on stderr only: a bar on a terminal, else one plain
//! line every 10 s, with `--json` one event a second.
//!
//! Time is given by the caller. The numbers are the same in all three forms:
//! done, total, rate, time left, phase.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::Output;
use crate::units::{show_bytes, show_seconds};

/// One line of work in progress.
#[derive(Debug)]
pub struct Progress {
    output: Output,
    phase: &'static str,
    bar: Option<ProgressBar>,
    started_us: u64,
    shown_us: Option<u64>,
}

/// Where the work stands.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Step {
    /// Bytes done.
    pub done: u64,
    /// Bytes in all, as far as known.
    pub total: u64,
    /// Bytes a second, if the worker knows better than done over elapsed.
    pub rate: Option<f64>,
    /// Seconds left, if the worker knows.
    pub eta: Option<f64>,
}

impl Progress {
    /// Starts; draws nothing yet.
    pub fn new(output: Output, phase: &'static str, now_us: u64) -> Self {
        let bar = output.draws().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
                bar.set_style(style.progress_chars("#>."));
            }
            bar.set_prefix(phase);
            bar
        });
        Self { output, phase, bar, started_us: now_us, shown_us: None }
    }

    /// Tells where the work stands at `now_us`.
    pub fn update(&mut self, step: Step, now_us: u64) {
        let elapsed = now_us.saturating_sub(self.started_us) as f64 / 1e6;
        let rate =
            step.rate.unwrap_or(if elapsed > 0.0 { step.done as f64 / elapsed } else { 0.0 });
        let left = step.total.saturating_sub(step.done) as f64;
        let eta = step.eta.or((rate > 0.0).then(|| left / rate));
        if let Some(bar) = &self.bar {
            bar.set_length(step.total);
            bar.set_position(step.done);
            let eta = eta.map_or("?".into(), show_seconds);
            bar.set_message(format!("{}/s, {eta} left", show_bytes(rate as u64)));
            return;
        }
        let interval = if self.output.json { 1_000_000 } else { 10_000_000 };
        let last = self.shown_us.unwrap_or(self.started_us);
        if self.output.no_progress || now_us.saturating_sub(last) < interval {
            return;
        }
        self.shown_us = Some(now_us);
        if self.output.json {
            let event = serde_json::json!({
                "type": "progress", "phase": self.phase, "done_bytes": step.done,
                "total_bytes": step.total, "rate_bytes_per_second": rate, "eta_seconds": eta,
            });
            eprintln!("{event}");
        } else if !self.output.quiet {
            eprintln!(
                "{}: {} of {}, {}/s, {} left",
                self.phase,
                show_bytes(step.done),
                show_bytes(step.total),
                show_bytes(rate as u64),
                eta.map_or("?".into(), show_seconds),
            );
        }
    }

    /// Ends, leaving the terminal's line clean.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

const TEMPLATE: &str = "{prefix:12} [{bar:28}] {bytes}/{total_bytes}  {msg}";
