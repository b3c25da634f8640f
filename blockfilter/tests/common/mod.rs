//! A served file, and other people's NBD clients, which must be installed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use blockfilter::engine::real::RealClock;
use blockfilter::nbd::file::{FileError, FileExport};
use blockfilter::nbd::listen::{Address, Listener};
use blockfilter::nbd::server::{FixedExports, ServerConfig, ServerHandle};

/// A file of `size` bytes served as `disk` on a Unix socket.
pub struct Served {
    pub dir: tempfile::TempDir,
    pub server: Option<ServerHandle>,
}

impl Served {
    pub fn new(size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(dir.path().join("disk")).unwrap();
        file.set_len(size).unwrap();
        let mut served = Self { dir, server: None };
        served.start(false, ServerConfig::default());
        served
    }

    /// (Re)starts the server.
    pub fn start(&mut self, read_only: bool, config: ServerConfig) {
        self.server = None;
        let export = Arc::new(self.open(read_only));
        let listeners = vec![
            Listener::bind(&Address::Unix(self.socket())).unwrap(),
            Listener::bind(&Address::Tcp("127.0.0.1:0".to_owned())).unwrap(),
        ];
        let exports = Arc::new(FixedExports(vec![("disk".to_owned(), export)]));
        let clock = Arc::new(RealClock::new());
        self.server = Some(ServerHandle::start(listeners, config, exports, clock).unwrap());
    }

    /// A child that another test is just forking may hold the lock for a moment.
    fn open(&self, read_only: bool) -> FileExport {
        for _ in 0..1000 {
            match FileExport::open(&self.file(), read_only) {
                Err(FileError::Busy(_)) => std::thread::yield_now(),
                other => return other.unwrap(),
            }
        }
        panic!("the file stays busy");
    }

    pub fn file(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket().display())
    }

    pub fn tcp(&self) -> String {
        self.server.as_ref().unwrap().addresses()[1].to_string()
    }
}

/// Runs a program to its end; it must be there and succeed. Gives its output.
pub fn run(program: &str, args: &[&str]) -> String {
    let (ok, text) = run_any(program, args);
    assert!(ok, "{program} {args:?} failed:\n{text}");
    text
}

/// Runs a program to its end; it must be there. Tells whether it succeeded.
pub fn run_any(program: &str, args: &[&str]) -> (bool, String) {
    // Debian's python before any other: it has the nbd module.
    let path = format!("/usr/bin:/bin:/usr/sbin:/sbin:{}", std::env::var("PATH").unwrap());
    let output = Command::new("timeout")
        .args(["120", program])
        .args(args)
        .env("PATH", path)
        .output()
        .unwrap_or_else(|e| panic!("{program} cannot be started: {e}"));
    assert_ne!(output.status.code(), Some(127), "{program} is not installed");
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        text.push_str(&String::from_utf8_lossy(&output.stderr));
    }
    (output.status.success(), text)
}

/// Bytes that do not compress or repeat.
pub fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        out.extend_from_slice(&(seed ^ (seed >> 33)).to_le_bytes());
    }
    out.truncate(len);
    out
}

/// Writes a file.
pub fn write(path: &Path, data: &[u8]) {
    std::fs::write(path, data).unwrap();
}
