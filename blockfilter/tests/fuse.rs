//! Disks as files: the real kernel, loop devices and a file system on top.
#![allow(clippy::unwrap_used, reason = "tests")]

#[allow(unreachable_pub, dead_code, reason = "shared by several test programs")]
mod common;

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use blockfilter::engine::Clock;
use blockfilter::engine::real::RealClock;
use blockfilter::fuse::{self, FuseConfig, FuseError, FuseFile};
use blockfilter::nbd::server::ServerConfig;
use common::{Served, noise, run, run_any};

/// Tells when FUSE cannot be tested here, which is only right without root.
fn can_mount() -> bool {
    let can = rustix::process::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !can {
        println!("no root or no /dev/fuse: FUSE is not tested here");
    }
    can
}

struct Mounted {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<(), FuseError>>>,
}

impl Mounted {
    fn new(served: &Served, read_only: bool) -> Self {
        let path = served.dir.path().join("mnt");
        let file = |name: &str, read_only| FuseFile {
            name: name.to_owned(),
            socket: served.socket(),
            export: "disk".to_owned(),
            read_only,
        };
        let mut config = FuseConfig::new(path.clone(), vec![file("disk", read_only)]);
        config.files.push(file("again", true));
        config.connect_timeout = Duration::from_secs(5);
        let stop = Arc::new(AtomicBool::new(false));
        let (ready, wait) = std::sync::mpsc::channel();
        let for_thread = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let clock: Arc<dyn Clock> = Arc::new(RealClock::new());
            fuse::run(&config, &clock, &for_thread, || ready.send(()).unwrap())
        });
        let mounted = Self { path, stop, thread: Some(thread) };
        wait.recv_timeout(Duration::from_secs(20)).unwrap();
        mounted
    }

    fn file(&self) -> PathBuf {
        self.path.join("disk")
    }

    fn open(&self, flags: i32) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(flags).open(self.file()).unwrap()
    }

    fn finish(mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if std::thread::panicking() {
            let _ = run_any("umount", &["-l", self.path.to_str().unwrap()]);
        }
    }
}

#[test]
fn a_disk_is_a_file_of_its_size_that_cannot_change() {
    if !can_mount() {
        return;
    }
    let served = Served::new((8 << 20) + 512);
    let mounted = Mounted::new(&served, false);
    assert_eq!(std::fs::metadata(mounted.file()).unwrap().len(), (8 << 20) + 512);
    assert_eq!(std::fs::read_dir(&mounted.path).unwrap().count(), 2);
    let file = mounted.open(0);
    let data = noise(3 << 20, 5);
    file.write_all_at(&data, 1001).unwrap();
    file.sync_all().unwrap();
    let mut back = vec![0; 3 << 20];
    file.read_exact_at(&mut back, 1001).unwrap();
    assert!(back == data);
    assert!(std::fs::read(served.file()).unwrap()[1001..][..3 << 20] == data);
    // Past the end: nothing to read, no space to write, no way to grow.
    assert_eq!(file.read_at(&mut [0; 10], (8 << 20) + 512).unwrap(), 0);
    assert_eq!(file.read_at(&mut [0; 10], (8 << 20) + 510).unwrap(), 2);
    let error = file.write_at(b"x", (8 << 20) + 512).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    assert!(file.set_len(1).is_err());
    assert!(OpenOptions::new().write(true).truncate(true).open(mounted.file()).is_err());
    assert!(File::create(mounted.path.join("new")).is_err());
    // The other name of the disk is read-only.
    let again = mounted.path.join("again");
    assert!(OpenOptions::new().write(true).open(&again).is_err());
    assert_eq!(std::fs::read(&again).unwrap()[1001..1101], data[..100]);
    // Punched holes and zeroed ranges.
    let path = mounted.file();
    let path = path.to_str().unwrap();
    run("fallocate", &["-p", "-o", "4096", "-l", "8192", path]);
    run("fallocate", &["-z", "-n", "-o", "100000", "-l", "50000", path]);
    file.read_exact_at(&mut back, 0).unwrap();
    for (at, byte) in back.iter().enumerate().skip(1001) {
        let zero = (4096..12_288).contains(&at) || (100_000..150_000).contains(&at);
        let expected = if zero { 0 } else { data[at - 1001] };
        assert_eq!(*byte, expected, "{at}");
    }
    mounted.open(0o10_000).write_all_at(b"stable", 0).unwrap();
    drop(file);
    mounted.finish();
    assert_eq!(&std::fs::read(served.file()).unwrap()[..6], b"stable");
}

#[test]
fn a_mount_in_use_is_served_until_it_is_not() {
    if !can_mount() {
        return;
    }
    let served = Served::new(1 << 20);
    let mounted = Mounted::new(&served, false);
    let file = mounted.open(0);
    mounted.stop.store(true, Ordering::SeqCst);
    for _ in 0..200 {
        file.write_all_at(&[1; 4096], 0).unwrap();
        std::thread::yield_now();
    }
    drop(file);
    mounted.finish();
}

#[test]
fn a_folder_with_files_or_a_live_mount_is_refused() {
    if !can_mount() {
        return;
    }
    let served = Served::new(1 << 20);
    let clock: Arc<dyn Clock> = Arc::new(RealClock::new());
    let stop = AtomicBool::new(true);
    let config = FuseConfig::new(served.dir.path().to_owned(), Vec::new());
    let refused = fuse::run(&config, &clock, &stop, || {});
    assert!(matches!(refused, Err(FuseError::NotEmpty(_))), "{refused:?}");
    let mounted = Mounted::new(&served, false);
    let config = FuseConfig::new(mounted.path.clone(), Vec::new());
    let refused = fuse::run(&config, &clock, &stop, || {});
    assert!(matches!(refused, Err(FuseError::Mounted(_))), "{refused:?}");
    mounted.finish();
}

/// A loop device, detached on drop.
struct Loop(String);

impl Loop {
    fn new(file: &Path) -> Self {
        let path = file.to_str().unwrap();
        let args = ["--direct-io=on", "--sector-size", "4096", "-f", "--show", path];
        Self(run("losetup", &args).trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = run_any("losetup", &["-d", &self.0]);
    }
}

/// A mounted file system, unmounted on drop.
struct Fs(PathBuf);

impl Fs {
    fn new(device: &Loop, dir: &Path) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        run("mount", &[&device.0, dir.to_str().unwrap()]);
        Self(dir.to_owned())
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        let _ = run_any("umount", &[self.0.to_str().unwrap()]);
    }
}

#[test]
fn ext4_on_a_loop_device_survives_restarts_of_the_server() {
    if !can_mount() {
        return;
    }
    let mut served = Served::new(256 << 20);
    let mounted = Mounted::new(&served, false);
    let dir = served.dir.path().join("fs");
    let files: Vec<Vec<u8>> = (0..24).map(|i| noise(700_000 + i as usize * 4097, i)).collect();
    {
        let device = Loop::new(&mounted.file());
        run("mkfs.ext4", &["-q", "-F", &device.0]);
        let fs = Fs::new(&device, &dir);
        for (i, data) in files.iter().enumerate() {
            let mut file = File::create(fs.0.join(i.to_string())).unwrap();
            file.write_all(data).unwrap();
            if i % 3 == 0 {
                file.sync_all().unwrap();
            }
            if i % 8 == 5 {
                // The server dies with writes on their way; nobody sees an error.
                served.start(false, ServerConfig::default());
            }
        }
        std::fs::remove_file(fs.0.join("0")).unwrap();
        run("fstrim", &["-v", fs.0.to_str().unwrap()]);
        drop(fs);
        run("e2fsck", &["-f", "-n", &device.0]);
        let fs = Fs::new(&device, &dir);
        for (i, data) in files.iter().enumerate().skip(1) {
            assert!(std::fs::read(fs.0.join(i.to_string())).unwrap() == *data, "{i}");
        }
    }
    mounted.finish();
    // What the kernel's stack wrote is in the plain file.
    run("e2fsck", &["-f", "-n", served.file().to_str().unwrap()]);
}

/// Not a test by itself: mounts for [`what_a_killed_process_left_is_cleared_away`].
#[test]
fn mount_for_another_process() {
    let Ok(dir) = std::env::var("STANDFAST_TEST_MOUNT") else { return };
    let file = FuseFile {
        name: "disk".to_owned(),
        socket: Path::new(&dir).join("nbd.sock"),
        export: "disk".to_owned(),
        read_only: false,
    };
    let config = FuseConfig::new(Path::new(&dir).join("mnt"), vec![file]);
    let clock: Arc<dyn Clock> = Arc::new(RealClock::new());
    fuse::run(&config, &clock, &AtomicBool::new(false), || println!("\nmounted")).unwrap();
}

#[test]
fn what_a_killed_process_left_is_cleared_away() {
    if !can_mount() {
        return;
    }
    let served = Served::new(1 << 20);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["mount_for_another_process", "--exact", "--nocapture"])
        .env("STANDFAST_TEST_MOUNT", served.dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line == "mounted"));
    std::fs::write(served.dir.path().join("mnt/disk"), b"").unwrap_err();
    child.kill().unwrap();
    child.wait().unwrap();
    let error = std::fs::metadata(served.dir.path().join("mnt")).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::NotConnected);
    let mounted = Mounted::new(&served, false);
    mounted.open(0).write_all_at(b"x", 0).unwrap();
    mounted.finish();
}
