//! A filter process alone: no agent, no target. For tests of the data path
//! that need nothing else, and that want to kill it often.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use blockfilter::config::{DiskConfig, GroupConfig, GroupPaths};
use blockfilter::control::{Client, FilterStatus, Reply, Request};
use blockfilter::engine::real::RealFiles;

use crate::process::Daemon;
use crate::run::standfast;
use crate::site::write_image;
use crate::wait_until;

/// A group of one machine and its filter process.
#[derive(Debug)]
pub struct FilterOnly {
    folder: PathBuf,
    /// The group.
    pub config: GroupConfig,
    /// Its files.
    pub paths: GroupPaths,
    /// More variables for the process.
    pub env: Vec<(String, String)>,
    process: Option<Daemon>,
}

impl FilterOnly {
    /// Images of `size` bytes with the oracle's start content, a journal of
    /// `journal_mib` (1 MiB chunks). Nothing runs yet.
    pub fn new(name: &str, disks: usize, size: u64, journal_mib: u64) -> Self {
        let folder =
            tempfile::Builder::new().prefix(&format!("sf-{name}-")).tempdir().unwrap().keep();
        let group: blockfilter::names::Name = "g".parse().unwrap();
        let paths = GroupPaths::new(&folder, &group);
        std::fs::create_dir_all(paths.dir()).unwrap();
        let disk = |number: usize| {
            let path = folder.join(format!("disk{number}.img"));
            write_image(&path, number, size);
            DiskConfig {
                disk: format!("d{number}").parse().unwrap(),
                path,
                uuid: uuid::Uuid::new_v4(),
                size_bytes: size,
            }
        };
        let config = GroupConfig {
            uuid: uuid::Uuid::new_v4(),
            disks: (0..disks).map(disk).collect(),
            journal: paths.journal(),
            journal_bytes: journal_mib << 20,
            chunk_bytes: 1 << 20,
            arena_bytes: 4 << 20,
            fuse: None,
            group,
        };
        config.store(&RealFiles, &paths).unwrap();
        blockfilter::journal::create(&RealFiles, &config, &mut |_, _| Ok(())).unwrap();
        Self { folder, config, paths, env: Vec::new(), process: None }
    }

    /// A path in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Starts the process and waits until it serves.
    #[track_caller]
    pub fn start(&mut self) {
        let mut command = Command::new(standfast());
        command.args(["run-filter", "g", "--dir"]).arg(&self.folder);
        command.envs(self.env.iter().map(|(k, v)| (k, v)));
        let mut process = Daemon::spawn(command, &self.path("filter.log"));
        wait_until("the filter to serve", Duration::from_secs(90), || {
            assert!(process.is_running(), "the filter ended:\n{}", process.log_text());
            self.try_status()
        });
        self.process = Some(process);
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Its status, if it answers.
    pub fn try_status(&self) -> Option<FilterStatus> {
        let mut client = Client::connect(&self.paths.filter_socket()).ok()?;
        match client.ask(&Request::Status, Duration::from_secs(10)).ok()? {
            Reply::Status(status) => Some(*status),
            _ => None,
        }
    }

    /// Stops it after everything is on the disks.
    pub fn drain(&mut self) {
        let mut client = Client::connect(&self.paths.filter_socket()).unwrap();
        let reply = client.ask(&Request::Stop { drain: true }, Duration::from_secs(60)).unwrap();
        assert_eq!(reply, Reply::Stopped);
        let mut process = self.process.take().unwrap();
        wait_until("the filter to end", Duration::from_secs(30), || {
            (!process.is_running()).then_some(())
        });
    }

    /// The NBD URIs of the disks.
    pub fn uris(&self) -> Vec<String> {
        let socket = self.paths.nbd_socket();
        let uri = |d: &DiskConfig| {
            format!("nbd+unix:///{}?socket={}", self.config.export(&d.disk), socket.display())
        };
        self.config.disks.iter().map(uri).collect()
    }

    /// The backing files' bytes.
    pub fn backing(&self) -> Vec<Vec<u8>> {
        self.config.disks.iter().map(|d| std::fs::read(&d.path).unwrap()).collect()
    }

    /// The filter's log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("filter.log")).unwrap_or_default()
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for FilterOnly {
    fn drop(&mut self) {
        self.kill();
        crate::process::kill_mentioning(&self.folder);
        let _ = std::fs::remove_file(self.config.arena_path());
        if std::thread::panicking() {
            eprintln!("{}\nkept for a look: {}", self.log(), self.folder.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }
}
