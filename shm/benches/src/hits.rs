//! Measures the hit ratio of the page cache, in comparison with textbook policies and moka. All caches have the same amount of memory.
//!
//! Traces are requests drawn according to Zipf's law from 50,000 objects with a total size of 787 MiB. Some traces also contain objects
//! that are requested only once. A request that misses stores the object. The first requests fill the cache, and hits are counted among the
//! later requests.
//!
//! The memory is a share of the 787 MiB. For Forkyard this is the size of the whole segment, including values, keys, headers and index. For
//! the other policies, the charge for an object is the size of its value and its key, plus 64 bytes.

mod list;
mod policy;
mod queues;
mod s3fifo;
mod trace;

use std::fmt::Write as _;
use std::time::Instant;

use clap::Args;

use crate::error::Error;
use crate::hits::policy::{POLICIES, Policy};
use crate::hits::trace::{BETWEEN_SCANS, RECIPES, Recipe, SCAN, World};
use crate::only::Only;
use crate::say;

/// The policies with which the text below the table compares Forkyard.
const RIVALS: [&str; 4] = ["LRU", "S3-FIFO, freq ≥ 1", "S3-FIFO, freq ≥ 2", "moka"];
const OURS: &str = "forkyard";

/// Measure hit ratios of Forkyard and of other policies, with synthetic traces
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Number of counted requests in each trace
    #[arg(long, value_name = "N", default_value_t = 2_000_000, value_parser = clap::value_parser!(u32).range(1..=50_000_000))]
    requests: u32,

    /// Number of requests that fill the cache before counting begins
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(..=20_000_000))]
    warmup: u32,

    /// Seed of all random numbers
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    #[command(flatten)]
    only: Only,
}

/// The hits of each policy on one trace, in percent, in the order of `policies`.
struct Row {
    trace: String,
    hits: Vec<f64>,
}

/// Replays all traces on all policies, and returns the table.
pub(crate) fn run(options: &Options) -> Result<String, Error> {
    let (policies, recipes) = wanted(&options.only)?;
    let mut rows: Vec<Row> = Vec::new();
    for recipe in recipes {
        rows.push(row(recipe, &policies, options)?);
    }
    let mut out = String::new();
    let written = table(&mut out, &policies, &rows).and_then(|()| footer(&mut out, options));
    written.expect("writing to a string cannot fail");
    Ok(out)
}

fn row(recipe: &Recipe, policies: &[&Policy], options: &Options) -> Result<Row, Error> {
    let mut world = World::new(options.seed);
    let trace = world.trace(recipe, (options.warmup + options.requests) as usize);
    let capacity = recipe.capacity();
    let mut hits = Vec::new();
    for policy in policies {
        let began = Instant::now();
        let mut cache = (policy.open)(capacity)?;
        let mut counted = 0_u32;
        for (index, &request) in trace.iter().enumerate() {
            let hit = cache.request(request)?;
            counted += u32::from(hit && index >= options.warmup as usize);
        }
        let percent = 100.0 * f64::from(counted) / f64::from(options.requests);
        say(&format!("{:<24} {:<18} {percent:5.2} %  ({:.1?})", recipe.name(), policy.name, began.elapsed()));
        hits.push(percent);
    }
    Ok(Row { trace: recipe.name(), hits })
}

fn wanted(only: &Only) -> Result<(Vec<&'static Policy>, Vec<&'static Recipe>), Error> {
    let names = POLICIES.iter().map(|policy| policy.name.to_owned());
    only.check(&names.chain(RECIPES.iter().map(Recipe::name)).collect::<Vec<_>>())?;
    Ok((only.choose(&POLICIES, |policy| policy.name.to_owned()), only.choose(&RECIPES, Recipe::name)))
}

fn table(out: &mut String, policies: &[&Policy], rows: &[Row]) -> std::fmt::Result {
    let place = |name: &str| policies.iter().position(|policy| policy.name == name);
    let ours = place(OURS);
    let rivals: Vec<(&str, usize)> =
        RIVALS.iter().filter_map(|&name| Some((name, place(name)?))).filter(|_| ours.is_some()).collect();
    write!(out, "| hit %: trace, cache size |")?;
    policies.iter().try_for_each(|policy| write!(out, " {} |", policy.name))?;
    rivals.iter().try_for_each(|(name, _)| write!(out, " {OURS} − {name} |"))?;
    write!(out, "\n|---|{}\n", "--:|".repeat(policies.len() + rivals.len()))?;
    for Row { trace, hits } in rows {
        write!(out, "| {trace} |")?;
        hits.iter().try_for_each(|percent| write!(out, " {percent:.1} |"))?;
        if let Some(ours) = ours {
            rivals.iter().try_for_each(|&(_, rival)| write!(out, " {:+.1} |", hits[ours] - hits[rival]))?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn footer(out: &mut String, options: &Options) -> std::fmt::Result {
    let Options { requests, warmup, seed, .. } = options;
    let World { objects, total, .. } = World::new(*seed);
    writeln!(
        out,
        "\n{requests} requests after {warmup} for warming up, of {objects} objects, {} MiB in sum; seed {seed}. The cache size is \
         a share\nof that sum. For forkyard it is the whole segment; for the others an object takes its value, its key and \
         64 bytes.\nA scan: {SCAN} objects in a row that are asked for once, after {BETWEEN_SCANS} other requests.",
        total >> 20
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_choose_traces_and_policies() {
        let names = |only: &[&str]| wanted(&Only::of(only)).map(|(policies, recipes)| (policies.len(), recipes.len()));
        assert_eq!(names(&[]).unwrap(), (POLICIES.len(), RECIPES.len()));
        assert_eq!(names(&["LRU"]).unwrap(), (1, RECIPES.len()));
        assert_eq!(names(&["scans"]).unwrap(), (POLICIES.len(), 1));
        assert!(names(&["LRU", "no such"]).is_err());
    }

    #[test]
    fn a_row_shows_the_differences() {
        let policies: Vec<&Policy> = POLICIES.iter().filter(|p| p.name == OURS || p.name == "LRU").collect();
        let hits = policies.iter().map(|policy| if policy.name == OURS { 66.0 } else { 60.5 }).collect();
        let mut out = String::new();
        table(&mut out, &policies, &[Row { trace: "t".into(), hits }]).unwrap();
        assert!(out.contains("| +5.5 |"), "{out}");
    }
}
