//! Defines the columns of the table.

use crate::get::data::Shape;
use crate::get::measure::Work;

/// A column: the stored data, the operations, and the number of concurrent processes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) shape: Shape,
    pub(crate) work: Work,
    pub(crate) processes: usize,
}

const SMALL: Shape = Shape { size: 1024, keys: 10_000 };
const LARGE: Shape = Shape { size: 16 * 1024, keys: 10_000 };
const MANY: Shape = Shape { size: 1024, keys: 1_000_000 };

const fn cell(shape: Shape, work: Work, processes: usize) -> Cell {
    Cell { shape, work, processes }
}

/// The columns. Cells with stores come after cells that only read.
pub(crate) const CELLS: [Cell; 10] = [
    cell(SMALL, Work::Get, 1),
    cell(SMALL, Work::Get, 2),
    cell(SMALL, Work::Mix, 1),
    cell(SMALL, Work::Mix, 2),
    cell(LARGE, Work::Get, 1),
    cell(LARGE, Work::Get, 2),
    cell(LARGE, Work::Mix, 1),
    cell(LARGE, Work::Mix, 2),
    cell(MANY, Work::Get, 1),
    cell(MANY, Work::Get, 2),
];

pub(crate) const SHAPES: [Shape; 3] = [SMALL, LARGE, MANY];
pub(crate) const MOST_PROCESSES: usize = 2;

impl Cell {
    pub(crate) fn name(&self) -> String {
        let work = match self.work {
            Work::Get => "",
            Work::Mix => " 90/10",
        };
        let processes = match self.processes {
            1 => String::new(),
            more => format!(" ×{more}"),
        };
        format!("{}{work}{processes}", self.shape.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cell_names_are_distinct() {
        let mut names: Vec<String> = CELLS.iter().map(Cell::name).collect();
        assert_eq!(names[3], "1K/10k 90/10 ×2");
        names.sort();
        names.dedup();
        assert_eq!(names.len(), CELLS.len());
    }

    #[test]
    fn every_cell_has_its_data() {
        assert!(CELLS.iter().all(|cell| SHAPES.contains(&cell.shape) && cell.processes <= MOST_PROCESSES));
    }
}
