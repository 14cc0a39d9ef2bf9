//! Lines of JSON: an object each, its fields in the order in which they are added.
//!
//! May not: know what the fields mean.

use std::fmt::Display;
use std::io::Write as _;

/// A line that is being made.
#[derive(Debug)]
pub(crate) struct Object<'a>(&'a mut Vec<u8>);

impl<'a> Object<'a> {
    /// Begins behind what is in `line`.
    pub(crate) fn begin(line: &'a mut Vec<u8>) -> Self {
        line.push(b'{');
        Self(line)
    }

    pub(crate) fn text(&mut self, key: &str, value: &str) {
        self.key(key);
        self.string(value);
    }

    /// A value that is a number, or `true`, or `null`, in JSON as it is here.
    pub(crate) fn plain(&mut self, key: &str, value: impl Display) {
        self.key(key);
        let _ = write!(self.0, "{value}"); // there is always room
    }

    /// The line, with its end.
    pub(crate) fn end(self) {
        self.0.extend_from_slice(b"}\n");
    }

    fn key(&mut self, key: &str) {
        if self.0.last() != Some(&b'{') {
            self.0.push(b',');
        }
        self.string(key);
        self.0.push(b':');
    }

    fn string(&mut self, text: &str) {
        let _ = serde_json::to_writer(&mut *self.0, text); // as above
    }
}
