//! The configuration file: TOML whose keys are the names of the flags, turned into command-line arguments.
//!
//! There is no separate list of names, types or limits: each key stands for the flag with the same name, and that
//! flag's parser checks the value. Flags and FORKYARD_* variables override the file.

use std::any::TypeId;
use std::error::Error as _;
use std::ffi::OsString;
use std::ops::Range;
use std::path::Path;

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::refused_flags;

/// The key that stands for the arguments after `--` on the command line.
const COMMAND: &str = "command";
/// Flags that cannot be set in a file.
const NEVER: [&str; 3] = ["config", "help", "version"];
/// Largest file that is read, in bytes.
const MAX_SIZE: u64 = 1 << 20;

/// The arguments that a file adds to the command line.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Additions {
    /// Flags, which come before the other arguments.
    pub(super) flags: Vec<OsString>,
    /// The arguments after `--`.
    pub(super) command: Vec<OsString>,
}

/// The errors in a file.
#[derive(Debug, Default)]
pub(super) struct Mistakes {
    /// One line per error: `FILE:LINE:COLUMN: error`.
    pub(super) lines: Vec<String>,
    /// The settings without a valid value.
    pub(super) settings: Vec<String>,
}

/// Reads a file for `command`; `matches` are the results from the command line and the variables. Returns the valid
/// settings and all errors.
pub(super) fn read(path: &Path, command: &Command, matches: &ArgMatches) -> (Additions, Mistakes) {
    let name = path.display().to_string();
    let text = match text_of(path) {
        Ok(text) => text,
        Err(cause) => {
            let lines = vec![format!("cannot read the configuration file {name}: {cause} (see --config)")];
            return (Additions::default(), Mistakes { lines, settings: Vec::new() });
        }
    };
    let (additions, broken, mistakes, settings) = Default::default();
    let mut reading = Reading { name, text: &text, command, matches, additions, broken, mistakes, settings };
    reading.read();
    reading.finish()
}

fn text_of(path: &Path) -> Result<String, String> {
    let metadata = std::fs::metadata(path).map_err(|error| error.to_string())?;
    // Reading a pipe could block, and a device may be endless.
    if !metadata.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    if metadata.len() > MAX_SIZE {
        return Err(format!("it is longer than {MAX_SIZE} bytes"));
    }
    std::fs::read_to_string(path).map_err(|error| error.to_string())
}

struct Reading<'a> {
    name: String,
    text: &'a str,
    command: &'a Command,
    matches: &'a ArgMatches,
    additions: Additions,
    /// Parts of the text that could not be parsed. The parser's placeholder values for these parts are not checked.
    broken: Vec<Range<usize>>,
    /// Each error, with its offset in the text.
    mistakes: Vec<(usize, String)>,
    /// The settings that are not used because of an error.
    settings: Vec<String>,
}

impl Reading<'_> {
    fn read(&mut self) {
        let (table, errors) = DeTable::parse_recoverable(self.text);
        let unclosed = table.get_ref().iter().find_map(|(key, value)| self.unclosed(key.get_ref(), value, &errors));
        // After an unclosed list, the parser reads every further line as an element of the list, and reports an error
        // for each line.
        let end = unclosed.as_ref().map_or(usize::MAX, |(at, _)| *at);
        for error in errors.iter().filter(|error| error.span().unwrap_or_default().start < end) {
            let at = error.span().unwrap_or_default();
            self.broken.extend(error.span());
            let name = self.text.get(at.clone()).unwrap_or_default().trim();
            let text = match error.message() {
                "duplicate key" => format!("'{name}' is given twice"),
                message if message.starts_with("invalid basic string") => {
                    "the string is not closed: \" is missing".to_owned()
                }
                message => message.to_owned(),
            };
            self.mistake(at, text);
        }
        if let Some((at, what)) = unclosed {
            self.mistake(at..at, what);
        }
        let mut seen: Vec<String> = Vec::new();
        for (key, value) in table.get_ref() {
            let flag = key.get_ref().replace('_', "-");
            if value.span().start >= end {
                self.settings.push(flag);
                continue;
            }
            let before = self.mistakes.len();
            if seen.contains(&flag) {
                self.mistake(key.span(), format!("'{flag}' is given twice (- and _ are the same)"));
            }
            self.setting(key.span(), &flag, value);
            if self.mistakes.len() > before {
                self.settings.push(flag.clone());
            }
            seen.push(flag);
        }
    }

    /// Returns the offset of an unclosed list or table that includes the settings after it, and the error to report.
    fn unclosed(&self, key: &str, value: &Spanned<DeValue<'_>>, errors: &[toml::de::Error]) -> Option<(usize, String)> {
        let (kind, bracket) = match value.get_ref() {
            DeValue::Array(_) => ("list", ']'),
            DeValue::Table(_) if self.text.get(value.span())?.starts_with('{') => ("table", '}'),
            _ => return None,
        };
        let (begin, end) = (value.span().start, value.span().end);
        let within = |error: &&toml::de::Error| error.span().is_some_and(|at| (begin..=end).contains(&at.start));
        let is_sign = |error: &&toml::de::Error| {
            let message = error.message();
            message.starts_with("unclosed ") || message.starts_with("unexpected `=` in array")
        };
        errors.iter().filter(within).find(is_sign)?;
        // The first line after the unclosed list or table that looks like a setting.
        let text = self.text.get(begin..)?;
        let is_setting = |line: &str| line.split_once('=').is_some_and(|(name, _)| is_name(name.trim()));
        let next = text.lines().skip(1).position(is_setting).map(|lines| self.line_of(begin) + lines + 1);
        let place = next.map_or_else(|| "at the end".to_owned(), |line| format!("before line {line}"));
        Some((begin, format!("'{key}': the {kind} that begins here is not closed ('{bracket}' is missing {place})")))
    }

    fn line_of(&self, at: usize) -> usize {
        self.text.get(..at).unwrap_or(self.text).matches('\n').count() + 1
    }

    fn setting(&mut self, at: Range<usize>, flag: &str, value: &Spanned<DeValue<'_>>) {
        if self.broken.iter().any(|broken| (broken.start..=broken.end).contains(&value.span().start)) {
            self.settings.push(flag.to_owned());
            return;
        }
        let argument = self.command.get_arguments().find(|argument| argument.get_long() == Some(flag));
        let behind = self.command.get_positionals().find(|argument| argument.get_id() == COMMAND);
        match (argument, behind) {
            (_, Some(argument)) if flag == COMMAND => {
                let words = self.words(value);
                if !self.is_given(argument) {
                    self.additions.command = words.into_iter().map(Into::into).collect();
                }
            }
            (Some(_), _) if NEVER.contains(&flag) => {
                self.mistake(at, format!("'{flag}' cannot be set in a configuration file (use the flag --{flag})"));
            }
            (Some(argument), _) => match refused_flags::reason(argument) {
                Some(reason) => self.mistake(at, format!("'{flag}' is not available here: {reason}")),
                None => self.flag(argument, flag, value),
            },
            (None, _) => {
                let hint = self.similar(flag).map(|name| format!(" (did you mean '{name}'?)"));
                self.mistake(at, format!("unknown setting '{flag}'{}", hint.unwrap_or_default()));
            }
        }
    }

    fn flag(&mut self, argument: &Arg, flag: &str, value: &Spanned<DeValue<'_>>) {
        let mut arguments = Vec::new();
        match (argument.get_action(), value.get_ref()) {
            (ArgAction::SetTrue, DeValue::Boolean(true)) => arguments.push(format!("--{flag}")),
            (ArgAction::SetTrue, DeValue::Boolean(false)) => {}
            (ArgAction::SetTrue, _) => {
                self.mistake(value.span(), format!("'{flag}' must be true or false (without quotes)"));
            }
            (_, DeValue::Boolean(given)) if argument.get_value_parser().type_id() == TypeId::of::<bool>() => {
                arguments.push(format!("--{flag}={given}"));
            }
            // The flag is valid without a value: `true` sets it, `false` does not.
            (_, DeValue::Boolean(given)) if argument.get_num_args().is_some_and(|count| count.min_values() == 0) => {
                arguments.extend(given.then(|| format!("--{flag}")));
            }
            (ArgAction::Append, DeValue::Array(values)) => {
                for value in values.iter() {
                    arguments.extend(self.checked(flag, value));
                }
            }
            (_, DeValue::Array(_)) => self.mistake(value.span(), format!("'{flag}' takes one value, not a list")),
            _ => arguments.extend(self.checked(flag, value)),
        }
        if !self.is_given(argument) {
            self.additions.flags.extend(arguments.into_iter().map(Into::into));
        }
    }

    /// Returns the flag with its value, if the flag's own parser accepts the value.
    fn checked(&mut self, flag: &str, value: &Spanned<DeValue<'_>>) -> Option<String> {
        let Some(text) = plain(value.get_ref()) else {
            self.mistake(value.span(), format!("'{flag}' takes a string or a number, not {}", kind(value.get_ref())));
            return None;
        };
        let argument = format!("--{flag}={text}");
        if let Err(error) = self.alone().try_get_matches_from([&argument]) {
            self.mistake(value.span(), format!("'{flag}': {}", explain(&error)));
            return None;
        }
        Some(argument)
    }

    fn words(&mut self, value: &Spanned<DeValue<'_>>) -> Vec<String> {
        let mut words = Vec::new();
        let Some(values) = value.get_ref().as_array() else {
            self.mistake(value.span(), format!("'{COMMAND}' must be a list of strings: the program and its arguments"));
            return words;
        };
        for value in values.iter() {
            match value.get_ref().as_str() {
                Some(word) => words.push(word.to_owned()),
                None => self.mistake(value.span(), format!("'{COMMAND}' must be a list of strings")),
            }
        }
        words
    }

    /// Returns the command without variables and required arguments, for parsing a single flag.
    fn alone(&self) -> Command {
        let command = self.command.clone().no_binary_name(true);
        command.mut_args(|argument| argument.env(Resettable::Reset).required(false))
    }

    /// Returns the setting with the most similar name, found by clap.
    fn similar(&self, flag: &str) -> Option<String> {
        let error = self.alone().try_get_matches_from([format!("--{flag}=x")]).err()?;
        match error.get(ContextKind::SuggestedArg)? {
            ContextValue::String(name) => {
                Some(name.trim_start_matches('-').to_owned()).filter(|name| !NEVER.contains(&name.as_str()))
            }
            _ => None,
        }
    }

    fn is_given(&self, argument: &Arg) -> bool {
        let source = self.matches.value_source(argument.get_id().as_str());
        matches!(source, Some(ValueSource::CommandLine | ValueSource::EnvVariable))
    }

    fn mistake(&mut self, at: Range<usize>, what: String) {
        self.mistakes.push((at.start, what));
    }

    fn finish(mut self) -> (Additions, Mistakes) {
        self.mistakes.sort();
        let (lines, settings) = (self.lines(), self.settings);
        (self.additions, Mistakes { lines, settings })
    }

    fn lines(&self) -> Vec<String> {
        let place = |(at, what): &(usize, String)| {
            let before = self.text.get(..*at).unwrap_or(self.text);
            let line = self.line_of(*at);
            let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
            format!("{}:{line}:{column}: {what}", self.name)
        };
        self.mistakes.iter().map(place).collect()
    }
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c))
}

/// Returns a value in the form that the command line uses.
fn plain(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Some(number.as_str().to_owned()),
        // An octal number such as 0o660 is a file mode.
        DeValue::Integer(number) if number.radix() == 8 => Some(number.as_str().to_owned()),
        DeValue::Integer(_)
        | DeValue::Float(_)
        | DeValue::Boolean(_)
        | DeValue::Datetime(_)
        | DeValue::Array(_)
        | DeValue::Table(_) => None,
    }
}

fn kind(value: &DeValue<'_>) -> String {
    match value {
        DeValue::Boolean(_) => "a boolean".to_owned(),
        DeValue::Integer(_) => "a number in another base".to_owned(),
        DeValue::Array(_) => "a list".to_owned(),
        other => format!("a {}", other.type_str()),
    }
}

/// Returns the message of the flag's parser, without clap's surrounding text.
pub(super) fn explain(error: &clap::Error) -> String {
    if let Some(source) = error.source() {
        return source.to_string();
    }
    let text = error.render().to_string();
    let lines = text.lines().take_while(|line| !line.starts_with("For more")).map(str::trim);
    let lines: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
    lines.join(" ").trim_start_matches("error: ").to_owned()
}
