//! Settings of the C library that it takes only when a program starts.
//!
//! For processes that move large frames from thread to thread and are not bound in
//! memory by the design: `target run` and the replicator.

use std::os::unix::process::CommandExt;
use std::process::Command;

/// Starts this program again, with the same arguments and process id, unless the settings are
/// there or somebody made others. Call it before anything is opened. If that
/// fails the process goes on without them, only slower.
pub fn tune() {
    if !cfg!(target_env = "gnu") || std::env::var_os(VARIABLE).is_some() {
        return;
    }
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let settings = settings(&cpu);
    // By its name, which `ps` shows; by its file, if the name is gone.
    let mut error = None;
    for program in [std::env::current_exe().unwrap_or_default(), "/proc/self/exe".into()] {
        let mut again = Command::new(program);
        let mut arguments = std::env::args_os();
        if let Some(name) = arguments.next() {
            again.arg0(name);
        }
        error = Some(again.args(arguments).env(VARIABLE, &settings).exec());
    }
    tracing::warn!(?error, "the C library keeps its own settings");
}

/// Frames of a few MiB are allocated in one thread and freed in another: without these
/// limits each goes back to the kernel and costs its page faults again. What is kept is at
/// most `trim_threshold` for each thread that frees.
///
/// On AMD's Zen 3 and 4 `rep movsb`, which glibc before 2.40 uses from 2112 bytes on, copies a
/// twelfth as fast when the target's address modulo 4096 is 1 to 15 above the source's, as it happens to be
/// where rustls hands out what it decrypted (glibc's bug 30994; its own remedy is the
/// same). (pure)
fn settings(cpu: &str) -> String {
    let mut settings = MALLOC.to_owned();
    if cpu.contains("AuthenticAMD") {
        settings.push_str(NO_MOVSB);
    }
    settings
}

const VARIABLE: &str = "GLIBC_TUNABLES";
const MALLOC: &str = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=67108864";
const NO_MOVSB: &str = ":glibc.cpu.x86_rep_movsb_threshold=4294967296";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_processors_with_the_slow_copy_get_the_other() {
        assert!(settings("vendor_id\t: AuthenticAMD\n").ends_with(NO_MOVSB));
        assert_eq!(settings("vendor_id\t: GenuineIntel\n"), MALLOC);
    }
}
