//! Settings of the C library that it takes only when a program starts.
//!
//! For processes that move large frames from thread to thread and are not bound in
//! memory by the design: `target run` and the replicator.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// Starts this program again with the same arguments and process id, once, unless somebody
/// made settings already. Call it before anything is opened. If that cannot be done
/// the process goes on without them, only slower.
pub fn apply() {
    let made = [TUNABLES, APPLIED].iter().any(|name| std::env::var_os(name).is_some());
    if made || !cfg!(target_env = "gnu") {
        return;
    }
    let mut arguments = std::env::args_os();
    let (Ok(program), Some(name)) = (std::env::current_exe(), arguments.next()) else { return };
    if program.file_name() != Path::new(&name).file_name() {
        // It is the loader, or was replaced.
        tracing::debug!(?program, ?name, "another name: the C library keeps its own settings");
        return;
    }
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    // A mark of our own: a program with capabilities does not get to see the other.
    let mut again = Command::new(program);
    again.arg0(name).args(arguments).env(TUNABLES, settings(&cpu)).env(APPLIED, "1");
    let error = again.exec();
    // The attempt took back that writing to a closed connection is only an error.
    let pipe = signal_hook::flag::register(signal_hook::consts::SIGPIPE, Arc::default());
    tracing::warn!(%error, ?pipe, "the C library keeps its own settings");
}

/// Frames of a few MiB are allocated in one thread and freed in another: with glibc's own limits
/// each goes back to the kernel and costs its page faults again. With these each
/// of its heaps keeps what it needed at most, 64 MiB and more.
///
/// On AMD's Zen 3 and 4 `rep movsb`, which glibc before 2.40 uses from 2112 bytes on, copies
/// at a twelfth of the speed when the target's address modulo 4096 is 1 to 15 above the source's,
/// as it happens to be where rustls hands out what it decrypted (glibc's bug 30994, with
/// the same remedy). Its other processors are not told apart, nor measured. (pure)
fn settings(cpu: &str) -> String {
    let mut settings = MALLOC.to_owned();
    if cpu.contains("AuthenticAMD") {
        settings.push_str(NO_MOVSB);
    }
    settings
}

const TUNABLES: &str = "GLIBC_TUNABLES";
const APPLIED: &str = "STANDFAST_TUNED";
const MALLOC: &str = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=67108864";
const NO_MOVSB: &str = ":glibc.cpu.x86_rep_movsb_threshold=4294967296";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_processors_of_amd_copy_without_rep_movsb() {
        assert!(settings("vendor_id\t: AuthenticAMD\n").ends_with(NO_MOVSB));
        assert_eq!(settings("vendor_id\t: GenuineIntel\n"), MALLOC);
    }
}
