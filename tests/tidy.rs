//! Rules about the sources that no linter knows. Each test names every
//! violation at once, as `file:line: what`.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Longest source file, tests included.
const FILE_LINES_MAX: usize = 800;
/// Longest function, from `fn` to its closing brace.
const FUNCTION_LINES_MAX: usize = 70;

#[test]
fn every_source_file_says_what_it_is() {
    let mut bad = Violations::default();
    for source in sources() {
        let first =
            source.text.lines().find(|line| !line.trim().is_empty() && !line.starts_with("#!"));
        if !first.is_some_and(|line| line.starts_with("//! ")) {
            bad.add(&source, 1, "has no module doc");
        }
    }
    bad.report();
}

#[test]
fn files_and_functions_are_short() {
    let mut bad = Violations::default();
    for source in sources() {
        let lines = source.text.lines().count();
        if lines > FILE_LINES_MAX {
            bad.add(&source, 1, &format!("{lines} lines; at most {FILE_LINES_MAX}"));
        }
        for (line, name, length) in functions(&scrub(&source.text)) {
            if length > FUNCTION_LINES_MAX {
                bad.add(
                    &source,
                    line,
                    &format!("fn {name}: {length} lines; at most {FUNCTION_LINES_MAX}"),
                );
            }
        }
    }
    bad.report();
}

#[test]
fn pure_modules_reach_for_nothing() {
    let forbidden = [
        "std::fs",
        "std::net",
        "std::thread",
        "std::process",
        "std::env",
        "std::os::unix::net",
        "time::Instant",
        "Instant::now",
        "SystemTime",
        "rustix::",
        "io_uring::",
    ];
    let mut bad = Violations::default();
    let mut pure = 0;
    for source in sources() {
        let head = source.text.lines().take_while(|l| l.starts_with("//!") && l.trim() != "//!");
        if !head.into_iter().any(|line| line.contains("(pure)")) {
            continue;
        }
        pure += 1;
        let code = scrub(without_tests(&source.text));
        for (number, line) in code.lines().enumerate() {
            for word in forbidden.iter().filter(|word| line.contains(**word)) {
                bad.add(&source, number + 1, &format!("a pure module uses {word}"));
            }
        }
    }
    assert!(pure > 0, "no module is marked (pure)");
    bad.report();
}

#[test]
fn nothing_is_left_unfinished() {
    // Spelt in two parts so that this file does not name itself.
    let words = [
        concat!("FIX", "ME"),
        concat!("XX", "X"),
        concat!("todo", "!("),
        concat!("unimpl", "emented!("),
    ];
    let mut bad = Violations::default();
    for source in sources() {
        for (number, line) in source.text.lines().enumerate() {
            for word in words.iter().filter(|word| line.contains(**word)) {
                bad.add(&source, number + 1, &format!("contains {word}"));
            }
        }
    }
    bad.report();
}

#[test]
fn tests_do_not_sleep_to_wait_and_are_not_ignored() {
    let mut bad = Violations::default();
    for source in sources() {
        if source.path.ends_with("tests/harness/wait.rs") {
            continue; // The one place that pauses between two looks at a condition.
        }
        let is_test = source.path.starts_with("tests") || source.path.ends_with("tests.rs");
        let skipped = if is_test { 0 } else { without_tests(&source.text).lines().count() };
        let code = scrub(&source.text);
        for (number, line) in code.lines().enumerate().skip(skipped) {
            if line.contains("thread::sleep") || line.contains("sleep(Duration") {
                bad.add(&source, number + 1, "a test sleeps; use e2e::wait_until");
            }
            if line.trim_start().starts_with("#[ignore") {
                bad.add(&source, number + 1, "a test is ignored");
            }
        }
    }
    bad.report();
}

#[test]
fn the_crate_named_target_holds_no_build_products() {
    let root = root();
    for product in ["debug", "release", ".rustc_info.json", "CACHEDIR.TAG"] {
        let path = root.join("target").join(product);
        assert!(!path.exists(), "{} is a build product; build into build/", path.display());
    }
}

#[test]
fn no_machine_path_and_no_private_registry_is_in_a_tracked_file() {
    let paths = [concat!("/wo", "rk/"), concat!("/tmp", "/wt")];
    let index = "registry+https://github.com/rust-lang/crates.io-index";
    let mut bad = Violations::default();
    for source in tracked(|_| true) {
        for (number, line) in source.text.lines().enumerate() {
            for path in paths.iter().filter(|path| names_path(line, path)) {
                bad.add(&source, number + 1, &format!("names {path}, a path of one machine"));
            }
            let registry = line.contains("registry+") || line.trim_start().starts_with("[source");
            let source_file =
                source.path.ends_with("Cargo.lock") || source.path.ends_with("config.toml");
            if source_file && registry && !line.contains(index) {
                bad.add(&source, number + 1, "names a registry other than crates.io");
            }
        }
    }
    bad.report();
}

#[test]
fn scripts_work_from_anywhere_and_build_outside_the_crate_named_target() {
    let mut bad = Violations::default();
    for script in
        tracked(|path| path.starts_with("scripts") && path.extension().is_some_and(|e| e == "sh"))
    {
        if !script.text.contains("cd \"$(dirname") {
            bad.add(&script, 1, "does not change to the repository's root");
        }
        if script.text.contains("cargo ") && !script.text.contains("export CARGO_TARGET_DIR") {
            bad.add(&script, 1, "calls cargo without exporting CARGO_TARGET_DIR");
        }
        if script.text.contains("--manifest-path") {
            bad.add(
                &script,
                1,
                "uses --manifest-path; cargo could take target/ for its build folder",
            );
        }
    }
    bad.report();
}

#[test]
fn the_function_counter_is_not_fooled_by_text() {
    let text = "fn a() { let s = \"}{\"; // }\n let c = '{'; let r = r#\"}\"#;\n}\nfn b();\nfn c<'a>(x: [u8; 2]) {\n}\n";
    assert_eq!(functions(&scrub(text)), vec![(1, "a".into(), 3), (5, "c".into(), 2)]);
}

struct Source {
    path: PathBuf,
    text: String,
}

#[derive(Default)]
struct Violations(String);

impl Violations {
    fn add(&mut self, source: &Source, line: usize, what: &str) {
        let _ = writeln!(self.0, "{}:{line}: {what}", source.path.display());
    }

    fn report(self) {
        assert!(self.0.is_empty(), "\n{}", self.0);
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the root").to_owned()
}

fn sources() -> Vec<Source> {
    tracked(|path| path.extension().is_some_and(|e| e == "rs"))
}

/// Tracked text files, or (outside git) all but build products.
fn tracked(wanted: impl Fn(&Path) -> bool) -> Vec<Source> {
    let root = root();
    let listed = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(&root)
        .output();
    let names: Vec<PathBuf> = match listed {
        Ok(out) if out.status.success() => String::from_utf8_lossy(&out.stdout)
            .split('\0')
            .filter(|name| !name.is_empty())
            .map(PathBuf::from)
            .collect(),
        _ => walk(&root, Path::new("")),
    };
    assert!(names.len() > 10, "the sources were not found in {}", root.display());
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(root.join(&path)).ok()?;
        Some(Source { path, text })
    };
    names.into_iter().filter(|path| wanted(path)).filter_map(read).collect()
}

fn walk(root: &Path, below: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root.join(below)).unwrap().flatten() {
        let path = below.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            if path != Path::new("build") && path != Path::new(".git") {
                found.extend(walk(root, &path));
            }
        } else {
            found.push(path);
        }
    }
    found
}

/// Everything above the file's own test module.
fn without_tests(text: &str) -> &str {
    text.split_once("#[cfg(test)]\nmod ").map_or(text, |(code, _)| code)
}

/// The line holds `path` as the start of an absolute path.
fn names_path(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '.' || c == '_' || c == '-' || c == '}')
    })
}

/// Replaces what is inside strings, characters and comments by blanks; lines stay.
fn scrub(text: &str) -> String {
    let bytes: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < bytes.len() {
        let stop = match (bytes[at], bytes.get(at + 1)) {
            ('/', Some('/')) => line_end(&bytes, at),
            ('/', Some('*')) => find(&bytes, at + 2, "*/"),
            ('"', _) => string_end(&bytes, at + 1),
            ('r', Some('"' | '#')) if at == 0 || !is_word(bytes[at - 1]) => raw_end(&bytes, at + 1),
            ('\'', Some('\\')) => find(&bytes, at + 3, "'"),
            ('\'', _) if bytes.get(at + 2) == Some(&'\'') => at + 3,
            _ => at,
        };
        if stop == at {
            out.push(bytes[at]);
            at += 1;
        }
        for c in &bytes[at.min(stop)..stop] {
            out.push(if *c == '\n' { '\n' } else { ' ' });
        }
        at = at.max(stop);
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn line_end(text: &[char], from: usize) -> usize {
    text[from..].iter().position(|c| *c == '\n').map_or(text.len(), |n| from + n)
}

fn find(text: &[char], from: usize, what: &str) -> usize {
    let what: Vec<char> = what.chars().collect();
    let from = from.min(text.len());
    let hit = text[from..].windows(what.len()).position(|w| w == what);
    hit.map_or(text.len(), |n| from + n + what.len())
}

fn string_end(text: &[char], mut at: usize) -> usize {
    while at < text.len() && text[at] != '"' {
        at += if text[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(text.len())
}

/// End of a raw string whose hashes start at `at`; `at - 1` if it is none.
fn raw_end(text: &[char], at: usize) -> usize {
    let hashes = text[at..].iter().take_while(|c| **c == '#').count();
    if text.get(at + hashes) != Some(&'"') {
        return at - 1;
    }
    find(text, at + hashes + 1, &format!("\"{}", "#".repeat(hashes)))
}

/// `(first line, name, lines)` of each function with a body, in scrubbed text.
fn functions(text: &str) -> Vec<(usize, String, usize)> {
    let chars: Vec<char> = text.chars().collect();
    let mut found = Vec::new();
    let mut line = 1;
    for at in 0..chars.len() {
        if chars[at] == '\n' {
            line += 1;
        }
        let starts =
            chars[at..].starts_with(&['f', 'n', ' ']) && (at == 0 || !is_word(chars[at - 1]));
        if !starts {
            continue;
        }
        let name: String = chars[at + 3..].iter().take_while(|c| is_word(**c)).collect();
        if let Some(lines) = body_lines(&chars[at..]).filter(|_| !name.is_empty()) {
            found.push((line, name, lines));
        }
    }
    found
}

/// Lines from here to the end of the first braced block; None if `;` comes first.
fn body_lines(text: &[char]) -> Option<usize> {
    let (mut lines, mut braces, mut brackets) = (1, 0, 0);
    for c in text {
        match c {
            '\n' => lines += 1,
            '(' | '[' => brackets += 1,
            ')' | ']' => brackets -= 1,
            ';' if braces == 0 && brackets == 0 => return None,
            '{' => braces += 1,
            '}' => {
                braces -= 1;
                if braces == 0 {
                    return Some(lines);
                }
            }
            _ => {}
        }
    }
    None
}
