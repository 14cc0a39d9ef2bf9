//! Formats the results as a table.

use std::collections::HashMap;
use std::fmt::Write as _;

use crate::get::cell::Cell;
use crate::get::competitor::{COMPETITORS, LIMIT};
use crate::get::measure::{Sample, median};

/// The measurements, and notes about them.
#[derive(Debug, Default)]
pub(crate) struct Results {
    /// Nanoseconds per operation in each round, by cell and row.
    times: HashMap<(String, usize), Vec<f64>>,
    /// Number of operations and of misses, by cell and row.
    misses: HashMap<(String, usize), (u64, u64)>,
    pub(crate) notes: Vec<String>,
}

/// Percentage of misses above which a note reports the misses.
const MENTIONED: f64 = 0.1;

impl Results {
    /// Adds a round: the samples of all processes.
    pub(crate) fn add(&mut self, cell: &Cell, row: usize, samples: &[Sample]) {
        let key = (cell.name(), row);
        let (operations, misses) = self.misses.entry(key.clone()).or_default();
        for sample in samples {
            *operations += sample.operations;
            *misses += sample.misses;
        }
        // A round is not counted if one process was disturbed during the whole round.
        if samples.iter().all(|sample| sample.kept > 0) {
            let mean = samples.iter().map(|sample| sample.ns).sum::<f64>() / samples.len() as f64;
            self.times.entry(key).or_default().push(mean);
        }
    }

    fn time(&self, cell: &Cell, row: usize) -> Option<f64> {
        median(&mut self.times.get(&(cell.name(), row))?.clone())
    }

    /// Returns the table, followed by its notes.
    pub(crate) fn table(&self, cells: &[&Cell], rows: &[usize]) -> String {
        let mut out = String::new();
        self.write(&mut out, cells, rows).expect("writing to a string cannot fail");
        out
    }

    fn write(&self, out: &mut String, cells: &[&Cell], rows: &[usize]) -> std::fmt::Result {
        let limit = COMPETITORS.iter().position(|each| each.name == LIMIT).unwrap_or_default();
        write!(out, "| ns per operation |")?;
        cells.iter().try_for_each(|cell| write!(out, " {} |", cell.name()))?;
        write!(out, "\n|---|{}\n", "--:|".repeat(cells.len()))?;
        for &row in rows {
            write!(out, "| {} |", COMPETITORS[row].name)?;
            for cell in cells {
                match (self.time(cell, row), self.time(cell, limit)) {
                    (Some(ns), Some(least)) => write!(out, " {ns:.0} ({}×) |", ratio(ns / least))?,
                    (Some(ns), None) => write!(out, " {ns:.0} |")?,
                    (None, _) => write!(out, " – |")?,
                }
            }
            writeln!(out)?;
        }
        writeln!(out)?;
        for note in self.notes.iter().chain(&self.misses_to_mention(cells, rows)) {
            writeln!(out, "- {note}")?;
        }
        Ok(())
    }

    fn misses_to_mention(&self, cells: &[&Cell], rows: &[usize]) -> Vec<String> {
        let mut notes = Vec::new();
        for &row in rows {
            for cell in cells {
                let (operations, misses) = self.misses.get(&(cell.name(), row)).copied().unwrap_or_default();
                let percent = 100.0 * misses as f64 / operations.max(1) as f64;
                if percent >= MENTIONED {
                    notes.push(format!("{}, {}: {percent:.2} % misses", COMPETITORS[row].name, cell.name()));
                }
            }
        }
        notes
    }
}

fn ratio(ratio: f64) -> String {
    if ratio < 9.95 { format!("{ratio:.2}") } else { format!("{ratio:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::get::cell::CELLS;

    fn sample(ns: f64, kept: u32, misses: u64) -> Sample {
        Sample { ns, kept, dropped: 0, operations: 1000, misses }
    }

    #[test]
    fn shows_medians_and_their_ratio_to_the_limit() {
        let mut results = Results::default();
        for ns in [100.0, 300.0, 200.0] {
            results.add(&CELLS[0], 0, &[sample(ns, 1, 0)]);
            results.add(&CELLS[0], 1, &[sample(ns, 1, 10), sample(ns + 100.0, 1, 0)]);
        }
        results.add(&CELLS[1], 0, &[sample(0.0, 0, 0)]);
        let table = results.table(&[&CELLS[0], &CELLS[1]], &[0, 1]);
        assert!(table.contains("| limit: HashMap, copy | 200 (1.00×) | – |"), "{table}");
        assert!(table.contains("| forkyard | 250 (1.25×) | – |"), "{table}");
        assert!(table.contains("forkyard, 1K/10k: 0.50 % misses"), "{table}");
    }

    #[test]
    fn large_ratios_have_no_decimals() {
        assert_eq!((ratio(1.0), ratio(9.949), ratio(85.6)), ("1.00".into(), "9.95".into(), "86".into()));
    }
}
