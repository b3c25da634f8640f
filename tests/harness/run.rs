//! Programs: the built `standfast`, and other people's.

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::Value;

use crate::wait::{Deadline, pause};

/// The built program. Builds it once a test process; `STANDFAST_BIN` names another.
pub fn standfast() -> &'static Path {
    static BIN: OnceLock<PathBuf> = OnceLock::new();
    BIN.get_or_init(|| {
        if let Some(path) = std::env::var_os("STANDFAST_BIN") {
            return path.into();
        }
        // The test runs as BUILD/PROFILE/deps/NAME-HASH.
        let me = std::env::current_exe().unwrap();
        let folder = me.parent().and_then(Path::parent).unwrap();
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
        cargo.args(["build", "--quiet", "--package", "tools", "--bin", "standfast"]);
        if folder.ends_with("release") {
            cargo.arg("--release");
        }
        cargo.env("CARGO_TARGET_DIR", folder.parent().unwrap()).current_dir(root());
        assert!(cargo.status().unwrap().success(), "standfast does not build");
        folder.join("standfast")
    })
}

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Panics with advice unless all `programs` are installed.
pub fn require(programs: &[&str]) {
    for program in programs {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
        assert!(
            folders.any(|folder| folder.join(program).exists()),
            "{program} is missing: scripts/test.sh installs what the tests need"
        );
    }
}

/// What a program did.
#[derive(Debug)]
pub struct Done {
    /// The command, for messages.
    pub command: String,
    /// Exit status and both outputs.
    pub output: Output,
}

impl Done {
    /// Exit code; -1 after a signal.
    pub fn code(&self) -> i32 {
        self.output.status.code().unwrap_or(-1)
    }

    /// Standard output.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned()
    }

    /// Standard error.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }

    /// Panics unless it succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert!(
            self.output.status.success(),
            "{} failed ({}):\n{}\n{}",
            self.command,
            self.output.status,
            self.out(),
            self.err()
        );
        self
    }

    /// Panics unless it ended with this code.
    #[track_caller]
    pub fn fails_with(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "{}:\n{}\n{}", self.command, self.out(), self.err());
        self
    }

    /// The last line of standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        let text = self.out();
        serde_json::from_str(text.trim())
            .or_else(|_| serde_json::from_str(text.trim().lines().last().unwrap_or_default()))
            .unwrap_or_else(|e| panic!("{}: {e}: {text:?}\n{}", self.command, self.err()))
    }

    /// The last line of standard error as JSON.
    #[track_caller]
    pub fn json_error(&self) -> Value {
        let text = self.err();
        let line = text.trim().lines().last().unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|e| panic!("{}: {e}: {text:?}", self.command))
    }
}

/// Runs a program to its end; panics after `limit`.
#[track_caller]
pub fn run(program: &Path, arguments: &[&OsStr], limit: Duration) -> Done {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    finish(command, limit)
}

/// Runs a prepared command to its end; panics after `limit`.
#[track_caller]
pub fn finish(mut command: Command, limit: Duration) -> Done {
    let text = format!("{command:?}");
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{text}: {e}"));
    let out = drain(child.stdout.take());
    let err = drain(child.stderr.take());
    let deadline = Deadline::after(limit);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if deadline.passed() {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{text} took more than {limit:?}");
        }
        pause();
    };
    let read = |thread: std::thread::JoinHandle<Vec<u8>>| thread.join().unwrap();
    Done { command: text, output: Output { status, stdout: read(out), stderr: read(err) } }
}

fn drain(from: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut data = Vec::new();
        if let Some(mut from) = from {
            let _ = from.read_to_end(&mut data);
        }
        data
    })
}

/// Runs another program by name with text arguments, 60 seconds at most.
#[track_caller]
pub fn tool(program: &str, arguments: &[&str]) -> Done {
    require(&[program]);
    let path = Path::new("/usr/sbin").join(program);
    let path = if path.exists() { path } else { program.into() };
    let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
    run(&path, &arguments, Duration::from_secs(60))
}

/// Runs `standfast` with text arguments, 60 seconds at most.
#[track_caller]
pub fn cli(arguments: &[&str]) -> Done {
    let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
    run(standfast(), &arguments, Duration::from_secs(60))
}
