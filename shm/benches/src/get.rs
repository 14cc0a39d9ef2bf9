//! Measures lookups in Forkyard, in comparison with a hash table, other caches in process and in shared memory, and servers.
//!
//! ```text
//! for each data set (size of a value, number of keys):
//!     servers, segments -> fork two workers, each with its own private stores and connections -> fill, check
//!     for each cell (get or mix, one process or two) and each round: every competitor for a short time
//! ```
//! Noise on the machine thus affects all competitors of a cell. `measure` describes the timing. Keys are requested according to Zipf's law.
//! Each process of a cell times itself, and the result is the mean over the processes.

mod apcu;
mod cell;
mod competitor;
mod data;
mod line;
mod lmdb;
mod measure;
mod memcached;
mod memory;
mod ours;
mod process;
mod redis;
mod server;
mod table;
mod worker;

use std::fs;
use std::time::Duration;

use clap::Args;
use tempfile::TempDir;

use crate::error::Error;
use crate::get::apcu::Apcu;
use crate::get::cell::{CELLS, Cell, MOST_PROCESSES, SHAPES};
use crate::get::competitor::{COMPETITORS, Competitor, Group, LIMIT, Place};
use crate::get::data::{Data, Shape};
use crate::get::line::Order;
use crate::get::measure::{Sample, Task};
use crate::get::ours::Segments;
use crate::get::server::Server;
use crate::get::table::Results;
use crate::get::worker::Worker;
use crate::only::Only;
use crate::say;

/// Measure the cost of a lookup in Forkyard and in other caches
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Number of rounds, of which the median is shown
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,

    /// Time for each competitor in each cell and round
    #[arg(long, value_name = "S", default_value = "0.3", value_parser = seconds)]
    seconds: Duration,

    /// Omit the competitors that are separate programs: APCu (PHP), memcached and Redis
    #[arg(long)]
    no_servers: bool,

    /// Seed of all random numbers
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    #[command(flatten)]
    only: Only,
}

/// Runs all measurements, and returns the table.
pub(crate) fn run(options: &Options) -> Result<String, Error> {
    let (cells, rows) = wanted(options)?;
    let mut results = Results::default();
    for shape in SHAPES {
        let cells: Vec<&Cell> = cells.iter().copied().filter(|cell| cell.shape == shape).collect();
        if cells.is_empty() {
            continue;
        }
        let groups: Vec<Group> =
            Group::ALL.into_iter().filter(|group| group.rows().any(|row| rows.contains(&row))).collect();
        if let Some(note) = too_large(shape, &groups) {
            results.notes.push(note);
            continue;
        }
        Stage::set(shape, &groups, options.seed, &mut results)?.play(&cells, &rows, options, &mut results)?;
    }
    let Options { rounds, seconds, .. } = options;
    results.notes.push(format!(
        "medians of {rounds} round(s) of {} s for each number, keys and value sizes as the \
        columns say; ×2: two processes at once; 90/10: each tenth operation stores",
        seconds.as_secs_f64()
    ));
    Ok(results.table(&cells, &rows))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "must be a number".to_owned())?;
    if (0.01..=60.0).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err("must be 0.01 to 60".into())
    }
}

/// Returns the columns and the rows. The baseline is always included, because the other rows are compared with it.
fn wanted(options: &Options) -> Result<(Vec<&'static Cell>, Vec<usize>), Error> {
    let names = COMPETITORS.iter().map(|each| each.name.to_owned());
    options.only.check(&names.chain(CELLS.iter().map(Cell::name)).collect::<Vec<_>>())?;
    let cells = options.only.choose(&CELLS, Cell::name);
    let chosen: Vec<&Competitor> = options.only.choose(&COMPETITORS, |each| each.name.to_owned());
    let takes_part = |each: &Competitor| {
        each.name == LIMIT || (chosen.contains(&each) && !(options.no_servers && each.group.is_program()))
    };
    let rows = (0..COMPETITORS.len()).filter(|&row| takes_part(&COMPETITORS[row])).collect();
    Ok((cells, rows))
}

/// Returns the reason to skip this data set if it does not fit into memory.
fn too_large(shape: Shape, groups: &[Group]) -> Option<String> {
    let copies: u64 = groups.iter().map(|group| if group.is_private() { MOST_PROCESSES as u64 } else { 1 }).sum();
    let needed = copies * (shape.bytes() + u64::from(shape.keys) * 384);
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let available = line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024;
    let name = shape.name();
    (needed > available / 10 * 9).then(|| {
        let (needed, available) = (needed >> 20, available >> 20);
        format!("{name} was left out: it takes some {needed} MiB of memory, and {available} MiB are available")
    })
}

/// A data set with the servers and processes that serve it.
struct Stage {
    data: Data,
    workers: Vec<Worker>,
    apcu: Option<Apcu>,
    _servers: Vec<Server>,
    _dir: TempDir,
}

impl Stage {
    fn set(shape: Shape, groups: &[Group], seed: u64, results: &mut Results) -> Result<Stage, Error> {
        let has = |group| groups.contains(&group);
        let failed = Error::system("creating a temporary directory");
        let dir = TempDir::with_prefix("forkyard-bench.").map_err(&failed)?;
        let memory_dir = TempDir::with_prefix_in("forkyard-bench.", "/dev/shm").map_err(&failed)?;
        let redis = has(Group::Redis).then(|| redis::start(dir.path())).transpose()?;
        let memcached = has(Group::Memcached).then(|| memcached::start(dir.path(), shape)).transpose()?;
        let ours = has(Group::Forkyard) || has(Group::Tagged);
        let place = Place {
            shape,
            segments: ours.then(|| Segments::new(shape)).transpose()?,
            lmdb: memory_dir.path().to_owned(),
            redis: redis.as_ref().map(|server| server.socket.clone()),
            memcached: memcached.as_ref().map(|server| server.socket.clone()),
        };
        let data = Data::new(shape, seed);
        let spawn = |_| Worker::spawn(&data, &place, groups);
        let mut workers = (0..MOST_PROCESSES).map(spawn).collect::<Result<Vec<_>, _>>()?;
        for (number, worker) in workers.iter_mut().enumerate() {
            worker.talk.order(Order::Open { fill: number == 0 })?;
            let notes = worker.talk.reply()?;
            if !notes.is_empty() {
                results.notes.push(format!("{}, process {}: {notes}", shape.name(), number + 1));
            }
        }
        // All users have opened the directory, so it can be removed now. Even if this process is killed, nothing is left behind.
        drop(memory_dir);
        let apcu = has(Group::Apcu).then(|| Apcu::start(dir.path(), &data)).transpose()?;
        let servers = redis.into_iter().chain(memcached).collect();
        let stage = Stage { data, workers, apcu, _servers: servers, _dir: dir };
        stage.note_apcu(results);
        Ok(stage)
    }

    fn note_apcu(&self, results: &mut Results) {
        let Some(Apcu { forks, empty_loop_ns, .. }) = &self.apcu else { return };
        let name = self.data.shape.name();
        results.notes.push(format!("APCu, {name}: {empty_loop_ns:.0} ns of each lookup are PHP's empty loop"));
        if !forks {
            results.notes.push(format!("APCu, {name} ×2 is not there: this PHP has no pcntl_fork"));
        }
    }

    fn play(&mut self, cells: &[&Cell], rows: &[usize], options: &Options, results: &mut Results) -> Result<(), Error> {
        for cell in cells {
            for round in 0..options.rounds {
                say(&format!("{}, round {} of {}", cell.name(), round + 1, options.rounds));
                // Each round starts at a different position, which is the same for all competitors of a round.
                let start = round as usize * 104_729;
                for &row in rows {
                    let task = Task { work: cell.work, time: options.seconds, start };
                    let samples = self.measure(row, cell.processes, task)?;
                    if !samples.is_empty() {
                        results.add(cell, row, &samples);
                    }
                    report(row, &samples);
                }
            }
        }
        Ok(())
    }

    /// Returns the samples of all processes, or no samples if the competitor cannot run with this number of processes.
    fn measure(&mut self, row: usize, processes: usize, task: Task) -> Result<Vec<Sample>, Error> {
        if COMPETITORS[row].group == Group::Apcu {
            return match &mut self.apcu {
                Some(apcu) if processes == 1 || apcu.forks => apcu.measure(task, processes),
                Some(_) | None => Ok(Vec::new()),
            };
        }
        let apart = self.data.sequence.len() / MOST_PROCESSES;
        let workers = &mut self.workers[..processes];
        for (number, worker) in workers.iter_mut().enumerate() {
            let task = Task { start: task.start + number * apart, ..task };
            worker.talk.order(Order::Run { row, task })?;
        }
        workers.iter_mut().map(|worker| worker.talk.sample()).collect()
    }
}

fn report(row: usize, samples: &[Sample]) {
    let told: Vec<String> = samples
        .iter()
        .map(|Sample { ns, kept, dropped, misses, .. }| {
            format!("{ns:8.0} ns ({kept} windows, {dropped} dropped, {misses} misses)")
        })
        .collect();
    say(&format!("  {:<24} {}", COMPETITORS[row].name, told.join("  ")));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(patterns: &[&str], no_servers: bool) -> Options {
        Options { rounds: 1, seconds: Duration::from_millis(1), no_servers, seed: 1, only: Only::of(patterns) }
    }

    #[test]
    fn the_baseline_is_always_included() {
        let (cells, rows) = wanted(&options(&["moka", "16K/10k"], false)).unwrap();
        assert_eq!((cells.len(), rows.len()), (4, 3));
        assert_eq!(COMPETITORS[rows[0]].name, LIMIT);
    }

    #[test]
    fn without_servers_there_are_three_rows_fewer() {
        assert_eq!(wanted(&options(&[], false)).unwrap().1.len(), COMPETITORS.len());
        assert_eq!(wanted(&options(&[], true)).unwrap().1.len(), COMPETITORS.len() - 3);
    }

    #[test]
    fn seconds_have_limits() {
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        assert!(seconds("0").is_err() && seconds("NaN").is_err() && seconds("100").is_err() && seconds("x").is_err());
    }
}
