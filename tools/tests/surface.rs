//! The command surface: every leaf of the clap tree takes `--json`, and answers
//! success and failure with JSON alone.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

/// Arguments that make each leaf's command line complete. A new leaf without an
/// entry here fails the test below.
const SAMPLES: &[(&str, &[&str])] = &[
    ("serve", &["/nonexistent/disk.img", "--nbd", "unix:/nonexistent/s.sock"]),
    ("target init", &["--listen", "127.0.0.1:0"]),
    ("target run", &[]),
    ("token create", &[]),
    ("cert issue", &["someone", "--out", "OUT"]),
    ("join", &["sf1.nonsense"]),
    ("agent run", &[]),
    ("protect", &["g", "d=/nonexistent/disk.img"]),
    ("unprotect", &["g"]),
    ("forget", &["g"]),
    ("status", &[]),
    ("sync", &["g"]),
    ("disk list", &[]),
    ("disk uri", &["g.d"]),
    ("point create", &["g"]),
    ("point list", &["g"]),
    ("point uri", &["g.d@latest"]),
    ("point mount", &["g@latest", "OUT"]),
    ("point unmount", &["OUT"]),
    ("drill start", &["g"]),
    ("drill list", &[]),
    ("drill finish", &["x"]),
    ("inspect journal", &["/nonexistent/journal"]),
    ("inspect store", &["/nonexistent/store"]),
    ("completions", &["bash"]),
    ("run-filter", &["g"]),
    ("run-replicator", &["g"]),
    ("run-fuse", &["--spec", "/nonexistent/spec"]),
];

fn leaves(command: &clap::Command, path: &str, found: &mut Vec<String>) {
    for sub in command.get_subcommands().filter(|s| s.get_name() != "help") {
        let name = format!("{path} {}", sub.get_name()).trim().to_owned();
        if sub.has_subcommands() {
            leaves(sub, &name, found);
        } else {
            found.push(name);
        }
    }
}

fn run(leaf: &str, arguments: &[&str], dir: &Path) -> (i32, String, String) {
    let out = dir.join("out");
    let mut command = Command::new(env!("CARGO_BIN_EXE_standfast"));
    command.args(leaf.split(' '));
    command.args(arguments.iter().map(|a| if *a == "OUT" { out.to_str().unwrap() } else { a }));
    command.arg("--json").arg("--dir").arg(dir).env_remove("STANDFAST_DIR").stdin(Stdio::null());
    let done = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (done.status.code().unwrap(), text(done.stdout), text(done.stderr))
}

/// stdout is empty or one document; a failure ends stderr with one error object
/// whose exit code is the process's.
#[track_caller]
fn check(leaf: &str, (code, stdout, stderr): &(i32, String, String)) {
    if !stdout.is_empty() {
        let document: Value =
            serde_json::from_str(stdout).unwrap_or_else(|e| panic!("{leaf}: {e}: {stdout}"));
        assert!(document.is_object(), "{leaf}: {stdout}");
    }
    if *code == 0 {
        assert!(!stdout.is_empty(), "{leaf} printed no document");
        return;
    }
    let last = stderr.lines().last().unwrap_or_else(|| panic!("{leaf}: {code}, stderr is empty"));
    let error: Value =
        serde_json::from_str(last).unwrap_or_else(|e| panic!("{leaf}: {e}: {stderr}"));
    assert_eq!(error["type"], "error", "{leaf}: {last}");
    assert_eq!(error["exit_code"], *code, "{leaf}: {last}");
    let sf = error["code"].as_str().unwrap();
    assert!(sf.len() == 7 && sf.starts_with("SF-"), "{leaf}: {last}");
    assert!(!error["message"].as_str().unwrap().is_empty(), "{leaf}: {last}");
    assert!([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12].contains(code), "{leaf}: {code}");
}

#[test]
fn every_leaf_answers_in_json() {
    let mut found = Vec::new();
    leaves(&tools::cli::command(), "", &mut found);
    for leaf in &found {
        let sample = SAMPLES.iter().find(|(name, _)| name == leaf);
        let (_, arguments) = sample.unwrap_or_else(|| panic!("give {leaf} an entry in SAMPLES"));
        let dir = tempfile::tempdir().unwrap();
        // Nothing is there: a clear failure, or a document.
        check(leaf, &run(leaf, arguments, &dir.path().join("none")));
        // A wrong flag is a usage error in JSON, too.
        let wrong = run(leaf, &["--no-such-flag"], dir.path());
        assert_eq!(wrong.0, 2, "{leaf}: {wrong:?}");
        check(leaf, &wrong);
    }
    for (name, _) in SAMPLES {
        assert!(found.iter().any(|f| f == name), "{name} is not a command any more");
    }
}

#[test]
fn a_target_can_be_made_and_asked_without_running() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("t");
    let init = run("target init", &["--listen", "127.0.0.1:0"], &target);
    check("target init", &init);
    assert_eq!(init.0, 0, "{}", init.2);
    let document: Value = serde_json::from_str(&init.1).unwrap();
    assert!(document["token"].as_str().unwrap().starts_with("sf1."));
    assert_eq!(document["ca_sha256"].as_str().unwrap().len(), 64);
    assert!(!document["listen"].as_str().unwrap().ends_with(":0"));
    for (leaf, arguments, code) in [
        ("target init", &[][..], 11),
        ("token create", &["--ttl", "5m"][..], 0),
        ("cert issue", &["someone", "--out", "OUT"][..], 0),
        ("status", &[][..], 7),
        ("point list", &["g"][..], 7),
        ("forget", &["g"][..], 9),
        ("forget", &["g", "--confirm", "h"][..], 9),
        ("forget", &["g", "--confirm", "g"][..], 7),
    ] {
        let done = run(leaf, arguments, &target);
        check(leaf, &done);
        assert_eq!(done.0, code, "{leaf} {arguments:?}: {done:?}");
    }
}

#[test]
fn a_bad_token_is_not_authorised() {
    let dir = tempfile::tempdir().unwrap();
    let done = run("join", &["sf1.nonsense"], &dir.path().join("a"));
    assert_eq!(done.0, 6, "{done:?}");
}
