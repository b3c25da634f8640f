//! `standfast`: parse, call, print. Everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    tools::cli::main(std::env::args_os().collect())
}
