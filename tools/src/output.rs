//! What goes to stdout and stderr.
//!
//! stdout carries the answer and nothing else: with `--json` exactly one
//! document (daemons: one ready line). Notes, progress, the next likely command
//! and failures go to stderr. Nothing here panics on a closed pipe.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;
use serde_json::Value;

use crate::errors::Failure;

/// How this run talks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Output {
    /// One JSON document on stdout, errors as one JSON line on stderr.
    pub json: bool,
    /// No notes, no next command.
    pub quiet: bool,
    /// No progress at all.
    pub no_progress: bool,
}

impl Output {
    /// The answer: `document` with `--json`, else `text`.
    pub fn answer(&self, schema: &str, document: &impl Serialize, text: &str) {
        if self.json {
            self.document(schema, document);
        } else {
            let newline = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
            put(&mut io::stdout(), &format!("{text}{newline}"));
        }
    }

    /// One JSON document with its schema's name, in both modes.
    pub fn document(&self, schema: &str, document: &impl Serialize) {
        let mut value = serde_json::to_value(document).unwrap_or(Value::Null);
        if let Value::Object(map) = &mut value {
            map.entry("schema").or_insert_with(|| format!("standfast/v1/{schema}").into());
        }
        put(&mut io::stdout(), &format!("{value}\n"));
    }

    /// A daemon's ready line.
    pub fn ready(&self, fields: Value) {
        let mut value = serde_json::json!({"type": "ready"});
        if let (Value::Object(map), Value::Object(more)) = (&mut value, fields) {
            map.extend(more);
        }
        put(&mut io::stdout(), &format!("{value}\n"));
    }

    /// A line for people, on stderr.
    pub fn note(&self, text: &str) {
        if !self.json && !self.quiet {
            put(&mut io::stderr(), &format!("{text}\n"));
        }
    }

    /// A warning: also with `--quiet`; a JSON line with `--json`.
    pub fn warn(&self, text: &str) {
        if self.json {
            let line = serde_json::json!({"type": "warning", "message": text});
            put(&mut io::stderr(), &format!("{line}\n"));
        } else {
            put(&mut io::stderr(), &format!("warning: {text}\n"));
        }
    }

    /// The next likely command, the last line of a success.
    pub fn next(&self, command: &str) {
        self.note(&format!("next: {command}"));
    }

    /// The failure, as the last thing on stderr.
    pub fn failure(&self, failure: &Failure) {
        let text = if self.json { failure.json() + "\n" } else { failure.human() };
        put(&mut io::stderr(), &text);
    }

    /// Whether progress may be drawn over itself.
    pub fn draws(&self) -> bool {
        !self.json && !self.no_progress && !self.quiet && io::stderr().is_terminal()
    }
}

/// Writes and flushes; a reader that went away is not an error of ours.
fn put(stream: &mut impl Write, text: &str) {
    let _ = stream.write_all(text.as_bytes()).and_then(|()| stream.flush());
}

/// A table for people, without lines that would break when copied.
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    let mut text = String::new();
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
