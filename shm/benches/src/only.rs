//! Implements `--only`, which selects rows and columns by name.

use crate::error::Error;

/// Patterns that select rows and columns by name. If no pattern matches a row (or a column), all rows (or columns) are included.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Only {
    /// Show only rows and columns whose names contain this; repeatable
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,
}

impl Only {
    pub(crate) fn choose<T>(&self, all: &'static [T], name: impl Fn(&T) -> String) -> Vec<&'static T> {
        let found: Vec<&T> = all.iter().filter(|&each| self.matches(&name(each))).collect();
        if found.is_empty() { all.iter().collect() } else { found }
    }

    /// Fails if a pattern matches no name.
    pub(crate) fn check(&self, names: &[String]) -> Result<(), Error> {
        match self.only.iter().find(|pattern| !names.iter().any(|name| name.contains(pattern.as_str()))) {
            Some(pattern) => Err(Error::NoSuchName { pattern: pattern.clone(), names: names.join("; ") }),
            None => Ok(()),
        }
    }

    fn matches(&self, name: &str) -> bool {
        self.only.iter().any(|pattern| name.contains(pattern.as_str()))
    }

    #[cfg(test)]
    pub(crate) fn of(patterns: &[&str]) -> Only {
        Only { only: patterns.iter().map(|&pattern| pattern.to_owned()).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_matching_pattern_all_rows_are_included() {
        const ROWS: [&str; 3] = ["LRU", "FIFO", "S3-FIFO"];
        let chosen = |patterns: &[&str]| Only::of(patterns).choose(&ROWS, ToString::to_string).len();
        assert_eq!((chosen(&[]), chosen(&["FIFO"]), chosen(&["LRU"]), chosen(&["a column"])), (3, 2, 1, 3));
    }

    #[test]
    fn a_pattern_that_matches_nothing_is_an_error() {
        let names = ["LRU".to_owned(), "FIFO".to_owned()];
        assert!(Only::of(&["LRU", "FI"]).check(&names).is_ok());
        assert!(Only::of(&["LRU", "lru"]).check(&names).is_err());
    }
}
