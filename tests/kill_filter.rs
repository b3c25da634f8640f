//! kill -9 of the filter process: nothing that was answered is lost, and what
//! was not answered does not happen later.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use e2e::filter::FilterOnly;
use e2e::nbd::Client;
use e2e::oracle::History;
use e2e::process::Daemon;
use e2e::run::{finish, require};
use e2e::wait::Deadline;
use e2e::writer::{Load, StopOnDrop, run};
use e2e::{Rng, wait_until};

#[test]
fn answered_writes_survive_kill_9_of_the_filter() {
    kill_under_oracle("kill", &[]);
}

#[test]
fn answered_writes_survive_kill_9_with_the_plain_engine() {
    kill_under_oracle("kill-plain", &[("STANDFAST_IO_ENGINE", "blocking")]);
}

fn kill_under_oracle(name: &str, env: &[(&str, &str)]) {
    let seed = e2e::seed(name);
    let mut rng = Rng::new(seed);
    let mut filter = FilterOnly::new(name, 2, 8 << 20, 18);
    filter.env = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    filter.start();
    let history = History::stamped();
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let load = Load {
        uris: filter.uris(),
        writers: 4,
        seed,
        requests: u64::MAX,
        rest: Duration::ZERO,
        patience: Duration::from_secs(60),
    };
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        let writers = scope.spawn(|| run(&load, &history, &stop, &done));
        for _ in 0..12 {
            // A random number of answers between two kills, not a random time.
            let until = done.load(Ordering::SeqCst) + 20 + rng.below(1500);
            wait_until("answers", Duration::from_secs(60), || {
                let reached = done.load(Ordering::SeqCst) >= until || stop.load(Ordering::SeqCst);
                reached.then_some(())
            });
            filter.kill();
            filter.start();
        }
        stop.store(true, Ordering::SeqCst);
        writers.join().unwrap().unwrap();
    });
    let now = history.now();
    let read =
        |uri: &String| Client::connect(uri, Duration::from_secs(60)).unwrap().read_all().unwrap();
    let served: Vec<Vec<u8>> = filter.uris().iter().map(read).collect();
    check(&history, &served, now, "as served");
    let status = filter.try_status().unwrap();
    assert_eq!(status.positions.incarnation, 1, "a kill does not start an incarnation");
    filter.drain();
    check(&history, &filter.backing(), now, "on the disks after a drain");
    println!("{} answers, engine {}", done.load(Ordering::SeqCst), status.io_engine);
}

fn check(history: &History, disks: &[Vec<u8>], floor: u64, what: &str) {
    let disks: Vec<&[u8]> = disks.iter().map(Vec::as_slice).collect();
    history.check(&disks, floor).unwrap_or_else(|e| panic!("{what}: {e}"));
}

#[test]
fn fio_through_a_reconnecting_client_verifies_across_kills() {
    require(&["fio", "nbdkit"]);
    let seed = e2e::seed("fio");
    let mut rng = Rng::new(seed);
    let mut filter = FilterOnly::new("fio", 1, 64 << 20, 34);
    filter.start();
    let front = filter.path("retry.sock");
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&front);
    nbdkit.args(["--filter=retry", "nbd"]);
    nbdkit.arg(format!("socket={}", filter.paths.nbd_socket().display()));
    nbdkit.args(["export=g.d0", "retries=20", "retry-delay=1", "retry-exponential=no"]);
    let _nbdkit = Daemon::spawn(nbdkit, &filter.path("nbdkit.log"));
    wait_until("nbdkit's socket", Duration::from_secs(30), || front.exists().then_some(()));
    let mut fio = Command::new("fio");
    fio.current_dir(filter.folder()).args([
        "--name=v",
        "--ioengine=nbd",
        "--rw=randwrite",
        "--bsrange=4k-64k",
        "--iodepth=8",
        "--size=60m",
        "--loops=2",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--verify_state_save=0",
        "--fsync=64",
        "--randrepeat=0",
    ]);
    fio.arg(format!("--randseed={}", seed % 1_000_000));
    fio.arg(format!("--uri=nbd+unix:///?socket={}", front.display()));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        scope.spawn(|| {
            for _ in 0..4 {
                let before = filter.try_status().map_or(0, |s| s.writes);
                let more = 100 + rng.below(600);
                let deadline = Deadline::after(Duration::from_secs(10));
                while !stop.load(Ordering::SeqCst)
                    && !deadline.passed()
                    && filter.try_status().is_some_and(|s| s.writes < before + more)
                {
                    e2e::wait::pause();
                }
                filter.kill();
                filter.start();
            }
        });
        let done = finish(fio, Duration::from_secs(150));
        stop.store(true, Ordering::SeqCst);
        done.ok();
    });
}
