//! Keeps the last lines of a process's output, which often say why it died.

use std::collections::VecDeque;

/// Maximum number of lines.
const MAX_LINES: usize = 5;
/// Maximum length of a line, in characters.
const MAX_LENGTH: usize = 500;

/// The last lines that are not blank. Equal consecutive lines are kept once, with their number.
#[derive(Clone, Debug, Default)]
pub(crate) struct LastLines(VecDeque<(String, u64)>);

impl LastLines {
    pub(super) fn push(&mut self, line: &str) {
        if line.trim().is_empty() {
            return;
        }
        let end = line.char_indices().nth(MAX_LENGTH).map_or(line.len(), |(end, _)| end);
        let line = &line[..end];
        if let Some((last, times)) = self.0.back_mut()
            && last == line
        {
            *times += 1;
            return;
        }
        // A process may write many lines, so the memory of the oldest one is used again.
        let oldest = if self.0.len() == MAX_LINES { self.0.pop_front() } else { None };
        let mut kept = oldest.map_or_else(String::new, |(line, _)| line);
        kept.clear();
        kept.push_str(line);
        self.0.push_back((kept, 1));
    }

    /// Returns the last line; empty if there is none.
    pub(crate) fn last(&self) -> String {
        self.0.back().map(|(line, _)| line.clone()).unwrap_or_default()
    }

    /// Returns the lines, each with the number of its repetitions.
    pub(crate) fn lines(&self) -> Vec<String> {
        let describe = |(line, times): &(String, u64)| match times {
            1 => line.clone(),
            times => format!("{line} ({times} times)"),
        };
        self.0.iter().map(describe).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept_and_equal_ones_are_counted() {
        let mut kept = LastLines::default();
        assert_eq!((kept.last(), kept.lines().len()), (String::new(), 0));
        for line in ["a", "b", "b", "", "b", "c", "d", " ", "e", "f"] {
            kept.push(line);
        }
        assert_eq!(kept.lines(), ["b (3 times)", "c", "d", "e", "f"]);
        assert_eq!(kept.last(), "f");
        kept.push(&"é".repeat(MAX_LENGTH + 1));
        assert_eq!(kept.last(), "é".repeat(MAX_LENGTH));
    }
}
