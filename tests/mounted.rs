//! A mounted ext4 on a protected disk (FUSE file and loop device) sees no error
//! while the filter is killed again and again, and the replica is the same.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use e2e::points::read;
use e2e::process::kill_and_wait;
use e2e::run::tool;
use e2e::site::Site;
use e2e::writer::StopOnDrop;
use e2e::{Rng, wait_until};

/// A loop device over a FUSE file, mounted; undone on drop.
struct Mounted {
    fuse: PathBuf,
    device: String,
    place: PathBuf,
}

impl Mounted {
    fn new(site: &Site, fuse: &Path, file: &str) -> Self {
        let arguments = ["--direct-io=on", "--sector-size", "4096", "-f", "--show", file];
        let device = tool("losetup", &arguments).ok().out().trim().to_owned();
        let place = site.path("mnt");
        std::fs::create_dir_all(&place).unwrap();
        let mounted = Self { fuse: fuse.to_owned(), device, place };
        mounted.mount();
        mounted
    }

    fn mount(&self) {
        let place = self.place.display().to_string();
        tool("mount", &["-t", "ext4", "-o", "errors=remount-ro", &self.device, &place]).ok();
    }

    fn unmount(&self) {
        tool("umount", &[&self.place.display().to_string()]).ok();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for arguments in [
            vec!["umount".to_owned(), "-l".to_owned(), self.place.display().to_string()],
            vec!["losetup".to_owned(), "-d".to_owned(), self.device.clone()],
            vec!["umount".to_owned(), "-l".to_owned(), self.fuse.display().to_string()],
        ] {
            let mut command = std::process::Command::new(&arguments[0]);
            let _ = command.args(&arguments[1..]).stderr(std::process::Stdio::null()).status();
        }
    }
}

#[test]
fn a_mounted_file_system_sees_no_error_across_kills_of_the_filter() {
    let ready = rustix::process::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !ready {
        println!("LEFT OUT: needs root and /dev/fuse");
        return;
    }
    let seed = e2e::seed("mounted");
    let site = Site::start("mounted");
    let image = site.path("disk.img");
    std::fs::File::create(&image).unwrap().set_len(96 << 20).unwrap();
    tool("mkfs.ext4", &["-q", "-b", "4096", &image.display().to_string()]).ok();
    let fuse = site.path("fuse");
    let pair = format!("d={}", image.display());
    let place = fuse.display().to_string();
    let arguments = ["protect", "g", &pair, "--journal-size", "128MiB", "--fuse", &place];
    let document = site.at_agent(&arguments).ok().json();
    let file = document["disks"][0]["file"].as_str().expect("a FUSE file").to_owned();
    wait_until("the FUSE file", Duration::from_secs(30), || {
        std::fs::metadata(&file).ok().filter(|m| m.len() == 96 << 20)
    });
    let mounted = Mounted::new(&site, &fuse, &file);
    let written = write_across_kills(&site, &mounted, seed);
    mounted.unmount();
    tool("e2fsck", &["-fn", &mounted.device]).ok();
    mounted.mount();
    for (name, content) in &written {
        let found = std::fs::read(mounted.place.join(name)).unwrap();
        assert!(found == *content, "{name} differs after a remount");
    }
    mounted.unmount();
    site.wait_protected("g");
    site.at_agent(&["sync", "g", "--timeout", "60s"]).ok();
    let uri = site.at_agent(&["disk", "uri", "g.d"]).ok().json();
    let source = read(uri["uri"].as_str().unwrap());
    let replica = read(&site.point_uri("g", "d", "latest"));
    assert!(source == replica, "the replica differs");
    let copy = site.path("replica.img");
    std::fs::write(&copy, &replica).unwrap();
    tool("e2fsck", &["-fn", &copy.display().to_string()]).ok();
    println!("{} files", written.len());
}

/// Writes files, each with fsync, while the filter is killed five times.
fn write_across_kills(site: &Site, mounted: &Mounted, seed: u64) -> Vec<(String, Vec<u8>)> {
    let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
    let written = Mutex::new(Vec::new());
    let write = || -> std::io::Result<()> {
        let mut rng = Rng::new(seed);
        while !stop.load(Ordering::SeqCst) {
            let number = count.load(Ordering::SeqCst);
            // Names come again, so that files are replaced, too.
            let name = format!("f{}", number % 150);
            let bytes = rng.below(200_000) / 8;
            let content: Vec<u8> = (0..bytes).flat_map(|_| rng.next_u64().to_le_bytes()).collect();
            let path = mounted.place.join(&name);
            let file = std::fs::File::create(&path)?;
            std::io::Write::write_all(&mut &file, &content)?;
            file.sync_all()?;
            let mut written = written.lock().unwrap();
            written.retain(|(other, _): &(String, Vec<u8>)| *other != name);
            written.push((name, content));
            count.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        let writer = scope.spawn(write);
        let mut rng = Rng::new(seed ^ 1);
        for _ in 0..5 {
            let until = count.load(Ordering::SeqCst) + 5 + rng.below(60);
            wait_until("files", Duration::from_secs(60), || {
                let ended = writer.is_finished();
                (ended || count.load(Ordering::SeqCst) >= until).then_some(())
            });
            kill_and_wait(site.wait_pid("filter", "g", None));
        }
        let until = count.load(Ordering::SeqCst) + 20;
        wait_until("files after the last kill", Duration::from_secs(60), || {
            (writer.is_finished() || count.load(Ordering::SeqCst) >= until).then_some(())
        });
        stop.store(true, Ordering::SeqCst);
        writer.join().unwrap().expect("the file system saw no error");
    });
    written.into_inner().unwrap()
}
