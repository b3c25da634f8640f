//! A whole installation in a temporary folder: a target, an agent, their disks.
//!
//! Everything listens on loopback or Unix sockets. When a [`Site`] goes out of
//! scope its processes are killed (those too that the agent started) and, unless
//! the test failed, its folder removed.

use std::ffi::OsStr;
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::oracle::start_image;
use crate::process::{Daemon, kill_mentioning};
use crate::run::{Done, run, standfast};
use crate::wait_until;

/// A target and an agent.
#[derive(Debug)]
pub struct Site {
    folder: PathBuf,
    /// The address the target listens on.
    pub listen: String,
    /// The target's process, if it runs.
    pub target: Option<Daemon>,
    /// The agent's process, if it runs.
    pub agent: Option<Daemon>,
}

impl Site {
    /// A folder only; nothing runs.
    pub fn empty(name: &str) -> Self {
        standfast();
        let folder =
            tempfile::Builder::new().prefix(&format!("sf-{name}-")).tempdir().unwrap().keep();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self { folder, listen: format!("127.0.0.1:{port}"), target: None, agent: None }
    }

    /// Target and agent run and know each other.
    pub fn start(name: &str) -> Self {
        let mut site = Self::empty(name);
        let token = site.init_target();
        site.start_target();
        site.join(&token).ok();
        site.start_agent();
        site
    }

    /// A path in the site's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The agent's state directory.
    pub fn agent_dir(&self) -> PathBuf {
        self.path("a")
    }

    /// The target's.
    pub fn target_dir(&self) -> PathBuf {
        self.path("t")
    }

    /// `target init`; returns the token.
    pub fn init_target(&self) -> String {
        let done = self.at_target(&["target", "init", "--listen", &self.listen]).ok();
        done.json()["token"].as_str().unwrap().to_owned()
    }

    /// Starts `target run`.
    pub fn start_target(&mut self) {
        self.target = Some(self.daemon(&["target", "run"], &self.target_dir(), "target.log"));
    }

    /// Starts `agent run`.
    pub fn start_agent(&mut self) {
        self.agent = Some(self.daemon(&["agent", "run"], &self.agent_dir(), "agent.log"));
    }

    /// `join`.
    pub fn join(&self, token: &str) -> Done {
        self.at_agent(&["join", token])
    }

    fn daemon(&self, arguments: &[&str], dir: &Path, log: &str) -> Daemon {
        let mut command = Command::new(standfast());
        command.args(arguments).arg("--dir").arg(dir).arg("--json");
        // Theirs would be taken instead of the program's own.
        command.env_remove("GLIBC_TUNABLES").env_remove("STANDFAST_TUNED");
        Daemon::start(command, &self.path(log))
    }

    /// A command with `--dir` of the agent and `--json`.
    #[track_caller]
    pub fn at_agent(&self, arguments: &[&str]) -> Done {
        self.command(&self.agent_dir(), arguments)
    }

    /// A command with `--dir` of the target and `--json`.
    #[track_caller]
    pub fn at_target(&self, arguments: &[&str]) -> Done {
        self.command(&self.target_dir(), arguments)
    }

    #[track_caller]
    fn command(&self, dir: &Path, arguments: &[&str]) -> Done {
        let mut all: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
        all.extend([OsStr::new("--dir"), dir.as_os_str(), OsStr::new("--json")]);
        run(standfast(), &all, LIMIT)
    }

    /// A raw image with stamped content for the oracle's disk `number`.
    pub fn image(&self, name: &str, number: usize, size: u64) -> PathBuf {
        let path = self.path(name);
        write_image(&path, number, size);
        path
    }

    /// `protect`, with a journal small enough for tests; the disks' URIs.
    #[track_caller]
    pub fn protect(&self, group: &str, disks: &[(&str, &Path)], more: &[&str]) -> Vec<String> {
        let pairs: Vec<String> =
            disks.iter().map(|(disk, path)| format!("{disk}={}", path.display())).collect();
        let mut arguments = vec!["protect", group];
        arguments.extend(pairs.iter().map(String::as_str));
        if !more.contains(&"--journal-size") {
            arguments.extend(["--journal-size", "256MiB"]);
        }
        arguments.extend(more);
        let done = self.at_agent(&arguments).ok();
        let json = done.json();
        let uri = |disk: &Value| disk["uri"].as_str().unwrap().to_owned();
        json["disks"].as_array().unwrap_or_else(|| panic!("{json}")).iter().map(uri).collect()
    }

    /// The group's entry in the agent's status; None while there is no answer.
    pub fn group_status(&self, group: &str) -> Option<Value> {
        pick(&self.at_agent(&["status", group]), group)
    }

    /// The group's entry in the target's status.
    pub fn replica_status(&self, group: &str) -> Option<Value> {
        pick(&self.at_target(&["status", group]), group)
    }

    /// Waits until the source says that the group is protected.
    #[track_caller]
    pub fn wait_protected(&self, group: &str) {
        let mut last = Value::Null;
        let limit = Duration::from_secs(120);
        let deadline = crate::wait::Deadline::after(limit);
        wait_until("the group to be protected", limit + Duration::from_secs(5), || {
            last = self.group_status(group).unwrap_or(Value::Null);
            assert!(!deadline.passed(), "not protected within {limit:?}: {last}\n{}", self.logs());
            (last["state"] == "protected").then_some(())
        });
    }

    /// The process of a role (`filter`, `replicator`, `fuse`) of a group.
    pub fn pid_of(&self, role: &str, group: &str) -> Option<u32> {
        let status = self.at_agent(&["status"]);
        let json = (status.code() == 0).then(|| status.json())?;
        let of = |p: &&Value| p["role"] == role && p["group"] == group;
        let found = json["processes"].as_array()?.iter().find(of)?;
        found["pid"].as_u64().filter(|pid| *pid > 0).map(|pid| pid as u32)
    }

    /// Waits until a role has a process other than `before`.
    #[track_caller]
    pub fn wait_pid(&self, role: &str, group: &str, before: Option<u32>) -> u32 {
        wait_until(&format!("a {role} of {group}"), Duration::from_secs(60), || {
            let found = self.pid_of(role, group).filter(|pid| Some(*pid) != before)?;
            crate::process::alive(found).then_some(found)
        })
    }

    /// Ids of the group's points at the target, oldest first.
    pub fn points(&self, group: &str) -> Vec<Value> {
        let done = self.at_target(&["point", "list", group, "--limit", "1000000"]).ok();
        let mut points = done.json()["points"].as_array().unwrap().clone();
        points.reverse();
        points
    }

    /// The URI of one disk at one point.
    #[track_caller]
    pub fn point_uri(&self, group: &str, disk: &str, point: &str) -> String {
        let name = format!("{group}.{disk}@{point}");
        let done = self.at_target(&["point", "uri", &name]).ok();
        done.json()["uri"].as_str().unwrap().to_owned()
    }

    /// The logs' last lines.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        let mut folders = vec![self.folder.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "log") {
                    let log = std::fs::read_to_string(&path).unwrap_or_default();
                    let lines: Vec<&str> = log.lines().collect();
                    let tail = lines[lines.len().saturating_sub(30)..].join("\n");
                    text.push_str(&format!("--- {}\n{tail}\n", path.display()));
                }
            }
        }
        text
    }
}

/// A new raw image with the start content of the oracle's disk `number`.
pub fn write_image(path: &Path, number: usize, size: u64) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(size).unwrap();
    for (at, data) in start_image(number, size) {
        file.write_all_at(&data, at).unwrap();
    }
}

fn pick(done: &Done, group: &str) -> Option<Value> {
    let json = (done.code() == 0).then(|| done.json())?;
    json["groups"].as_array()?.iter().find(|g| g["group"] == group).cloned()
}

impl Drop for Site {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            eprintln!("{}", self.logs());
        }
        self.agent = None;
        kill_mentioning(&self.folder);
        self.target = None;
        if failed {
            eprintln!("kept for a look: {}", self.folder.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }
}

/// Longest time for one command.
const LIMIT: Duration = Duration::from_secs(120);
