//! Formats code addresses so that other processes can interpret them: relative to the file that contains the code, as
//! in `app+0x1234`. The command `addr2line -fipe app 0x1234` converts this address to a function name and a line.

use std::fmt::{self, Write};
use std::fs;

/// A file name is truncated to this many bytes.
const MAX_NAME: usize = 48;
/// A function name, which may contain many types, is truncated to this many characters.
const MAX_FUNCTION: usize = 120;

/// The files whose code this process has mapped.
#[derive(Debug)]
pub(crate) struct Modules(Vec<Module>);

#[derive(Debug)]
struct Module {
    name: String,
    base: usize,
    end: usize,
}

impl Modules {
    /// Reads the list of files that are currently mapped into this process. The list is empty if `/proc` is not
    /// mounted.
    pub(crate) fn own() -> Self {
        Self::parse(&fs::read_to_string("/proc/self/maps").unwrap_or_default())
    }

    /// Reads lines such as `5581a000-5581f000 r--p 00000000 fe:01 1234   /usr/bin/app`.
    fn parse(maps: &str) -> Self {
        let mut modules: Vec<Module> = Vec::new();
        for line in maps.lines() {
            let mut words = line.splitn(6, ' ');
            let (Some(range), Some(path)) = (words.next(), words.nth(4)) else { continue };
            let path = path.trim_start().trim_end_matches(" (deleted)");
            let hex = |text| usize::from_str_radix(text, 16).ok();
            let Some((Some(start), Some(end))) = range.split_once('-').map(|(a, b)| (hex(a), hex(b))) else { continue };
            let offset = line.split(' ').nth(2).and_then(hex).unwrap_or(0);
            let Some((_, name)) = path.rsplit_once('/') else { continue };
            let name: String =
                name.chars().map(|c| if c.is_ascii_graphic() { c } else { '_' }).take(MAX_NAME).collect();
            match modules.last_mut().filter(|last| last.name == name) {
                Some(last) => last.end = end,
                None if offset == 0 => modules.push(Module { name, base: start, end }),
                None => {}
            }
        }
        Self(modules)
    }

    /// Writes an address, as a plain number if no mapped file contains it. Async-signal-safe if `out` is.
    pub(crate) fn write(&self, out: &mut impl Write, address: usize) -> fmt::Result {
        match self.0.iter().find(|module| (module.base..module.end).contains(&address)) {
            Some(Module { name, base, .. }) => write!(out, "{name}+{:#x}", address - base),
            None => write!(out, "{address:#x}"),
        }
    }

    /// Reads an address that a process with the same files wrote, and returns the corresponding address in this process.
    pub(crate) fn read(&self, text: &str) -> Option<usize> {
        let (name, offset) = text.rsplit_once('+').unwrap_or(("", text));
        let offset = usize::from_str_radix(offset.strip_prefix("0x")?, 16).ok()?;
        if name.is_empty() {
            return Some(offset);
        }
        let module = self.0.iter().find(|module| module.name == name)?;
        module.base.checked_add(offset).filter(|&address| address < module.end)
    }
}

/// Returns the functions at these addresses, the innermost first, each with its source location if the files contain
/// it.
///
/// This function is slow and allocates memory. It must not be called in a signal handler.
pub(crate) fn names_of(addresses: impl Iterator<Item = usize>) -> Vec<String> {
    let mut names = Vec::new();
    for address in addresses {
        let before = names.len();
        // `resolve` expects a return address, so one byte is added.
        backtrace::resolve(std::ptr::without_provenance_mut(address.wrapping_add(1)), |symbol| {
            let Some(name) = symbol.name() else { return };
            // The paths of the standard library's sources begin with its build directory, and are of no use to the
            // reader.
            let file = symbol.filename().filter(|file| !file.starts_with("/rustc/"));
            let place = file.zip(symbol.lineno());
            let place = place.map_or_else(String::new, |(file, line)| format!(" {}:{line}", file.display()));
            let name: String = format!("{name:#}").chars().take(MAX_FUNCTION).collect();
            names.push(name + &place);
        });
        if names.len() == before {
            names.push(format!("{address:#x}"));
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_written_and_read_again() {
        let modules = Modules::own();
        let mut text = String::new();
        let own = an_address_is_written_and_read_again as fn() as usize;
        modules.write(&mut text, own).unwrap();
        assert!(text.starts_with("forkyard-") && text.contains("+0x"), "{text}");
        assert_eq!(modules.read(&text), Some(own));
        let mut plain = String::new();
        modules.write(&mut plain, 8).unwrap();
        assert_eq!((plain.as_str(), modules.read(&plain)), ("0x8", Some(8)));
        for nonsense in ["", "+", "0x", "no-such+0x1", "+0xzz", &text.replace("+0x", "+0xfffffff")] {
            assert_eq!(modules.read(nonsense), None, "{nonsense}");
        }
        let name = names_of([own].into_iter()).remove(0);
        assert!(name.contains("an_address_is_written_and_read_again"), "{name}");
    }
}
