//! `sync`: waits until everything acknowledged before the call is durable and
//! recoverable at the target. `point create` waits the same way.

use std::time::Duration;

use blockfilter::config::{GroupConfig, GroupPaths};
use blockfilter::control::{Client, Request};
use blockfilter::names::{Lsn, Name};
use clap::Args;

use super::Context;
use crate::daemon::{agent, source};
use crate::errors::{Exit, Failure, IoContext, Outcome};
use crate::units::{parse_duration, show_seconds};

/// Arguments of `sync`.
#[derive(Debug, Args)]
pub struct SyncArgs {
    /// The group.
    pub group: Name,
    /// Longest wait; exit code 8 when it passes.
    #[arg(long, default_value = "60s", value_parser = parse_duration)]
    pub timeout: Duration,
}

/// Runs the command.
pub fn run(args: &SyncArgs, context: &Context) -> Outcome {
    let started = context.clock.mono_us();
    let (config, paths) = agent::load_config(&context.dir, &args.group)?;
    let mut filter = connect(context, &config, &paths)?;
    let positions = filter
        .positions(&Request::Commit, args.timeout.max(COMMIT_MIN))
        .failed(format!("cannot commit the writes of {}", args.group))?;
    wait_shipped(context, &config, &paths, positions.durable, started, args.timeout)?;
    let seconds = (context.clock.mono_us() - started) as f64 / 1e6;
    let document =
        serde_json::json!({"group": args.group, "lsn": positions.durable, "seconds": seconds});
    let text = format!(
        "{}: everything up to {} is durable at the target ({})",
        args.group,
        positions.durable,
        show_seconds(seconds)
    );
    context.output.answer("Sync", &document, &text);
    context.output.next(&format!("standfast point create {} --tag NAME", args.group));
    Ok(())
}

/// A connection to the group's filter.
pub fn connect(context: &Context, config: &GroupConfig, paths: &GroupPaths) -> Outcome<Client> {
    Client::connect(&paths.filter_socket()).map_err(|error| {
        let what = format!("the filter of group {} does not answer", config.group);
        Failure::coded(Exit::Unreachable, 2, what).why(error.to_string()).hint(format!(
            "standfast status {} --dir {}",
            config.group,
            context.dir.display()
        ))
    })
}

/// Waits until the target holds everything below `lsn` and can serve it.
pub fn wait_shipped(
    context: &Context,
    config: &GroupConfig,
    paths: &GroupPaths,
    lsn: Lsn,
    started_us: u64,
    timeout: Duration,
) -> Outcome {
    let deadline = started_us.saturating_add(timeout.as_micros() as u64);
    loop {
        let view = source::ask(config, paths);
        let replicator = view.replicator.as_ref();
        // Durable there is not enough during a copy: it must be recoverable.
        if replicator.and_then(|r| r.recoverable).is_some_and(|end| end >= lsn) {
            return Ok(());
        }
        let now = context.clock.mono_us();
        if now >= deadline {
            let judgement = source::judge(&view);
            let mut why = format!("the group is {}", judgement.state);
            for reason in &judgement.reasons {
                why.push_str(&format!("; {reason}"));
            }
            let what = format!("the target does not hold position {lsn} of {} yet", config.group);
            return Err(Failure::coded(Exit::TimedOut, 1, what).why(why).hint(format!(
                "it goes on by itself; standfast status {} --dir {}",
                config.group,
                context.dir.display()
            )));
        }
        // The filter wakes us when the ship floor gets there; seeds and a filter
        // that is away are looked at again after a short while.
        let left = Duration::from_micros((deadline - now).min(WAIT_STEP_US));
        let woken = Client::connect(&paths.filter_socket())
            .and_then(|mut c| c.wait(None, Some(lsn), left))
            .is_ok_and(|p| p.ship_floor >= lsn);
        if woken || view.filter.is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

const WAIT_STEP_US: u64 = 200_000;
const COMMIT_MIN: Duration = Duration::from_secs(10);
