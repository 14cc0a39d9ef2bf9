//! Measures the table of claims: claiming a unit of an app process and releasing it, by one gateway.
//!
//! The table shows the median of the rounds. The result of a round is the mean CPU time of one claim with its release.

use clap::Args;
use forkyard_shm::{Claims, HeldUnit};
use nix::time::ClockId;

use crate::error::Error;
use crate::say;

/// Measure the cost of claiming and releasing app processes
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Number of rounds, of which the median is shown
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,

    /// Number of slots for gateways
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4095))]
    gateways: u32,
}

/// App processes, and the units of each.
const SIZES: [(u32, u32); 3] = [(4, 1), (64, 1), (4, 64)];
/// Share of the units that are claimed during the measurement, in percent.
const LOADS: [usize; 2] = [0, 60];
/// Number of operations in a round.
const COUNT: u32 = 200_000;

/// Runs all measurements, and returns the table.
pub(crate) fn run(options: &Options) -> Result<String, Error> {
    let mut table = String::from("| ns per claim and release | idle | 60 % of the units claimed |\n|---|--:|--:|\n");
    for (processes, units) in SIZES {
        say(&format!("{processes} x {units}"));
        table += &format!("| {processes} app processes with {units} units |");
        for load in LOADS {
            let mut rounds = Vec::new();
            for _ in 0..options.rounds {
                let claims = Claims::create(processes, units, options.gateways).map_err(Error::Segment)?;
                rounds.push(claim_and_release(&claims, load));
            }
            rounds.sort_by(f64::total_cmp);
            table += &format!(" {:.0} |", rounds.get(rounds.len() / 2).copied().unwrap_or_default());
        }
        table.push('\n');
    }
    Ok(table)
}

fn claim_and_release(claims: &Claims, load: usize) -> f64 {
    for process in 0..claims.processes() {
        claims.open(process, 1, u32::MAX, 0);
    }
    let count = claims.processes() as usize * claims.units() as usize * load / 100;
    let held: Vec<HeldUnit> = (0..count).filter_map(|_| claims.claim(0, 0).unit).collect();
    let begun = cpu_time_ns();
    for now_us in 0..COUNT {
        if let Some(unit) = claims.claim(0, u64::from(now_us)).unit {
            let _ = std::hint::black_box(claims.release(unit, u64::from(now_us)));
        }
    }
    let mean = (cpu_time_ns() - begun) / f64::from(COUNT);
    drop(held);
    mean
}

/// Returns the CPU time of this thread, or 0 if it cannot be read.
fn cpu_time_ns() -> f64 {
    let Ok(time) = ClockId::CLOCK_THREAD_CPUTIME_ID.now() else { return 0.0 };
    std::time::Duration::from(time).as_secs_f64() * 1e9
}
