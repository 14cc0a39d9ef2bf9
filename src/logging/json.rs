//! Writes lines of JSON: one object per line, with its fields in the order in which they are added.
//!
//! This module must not depend on the meaning of the fields.

use std::fmt::Display;
use std::io::Write as _;

/// A line under construction.
#[derive(Debug)]
pub(crate) struct Object<'a>(&'a mut Vec<u8>);

impl<'a> Object<'a> {
    /// Begins an object after the content of `line`.
    pub(crate) fn begin(line: &'a mut Vec<u8>) -> Self {
        line.push(b'{');
        Self(line)
    }

    pub(crate) fn text(&mut self, key: &str, value: &str) {
        self.key(key);
        self.string(value);
    }

    /// Adds a value that is already valid JSON: a number, `true` or `null`.
    pub(crate) fn plain(&mut self, key: &str, value: impl Display) {
        self.key(key);
        let _ = write!(self.0, "{value}"); // writing to a Vec cannot fail
    }

    /// Ends the object and the line.
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
        let _ = serde_json::to_writer(&mut *self.0, text); // writing to a Vec cannot fail
    }
}
