//! Turns arguments, variables and the configuration file into clap's matches, and selects which of their errors to report: all
//! of them for `check`, otherwise the first.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgMatches, Command};

use super::file::{self, Mistakes};
use super::{Invocation, ServeRequest, hints, refused_flags};

/// An error in a combination of settings.
pub(super) struct Mismatch {
    pub(super) settings: &'static [&'static str],
    pub(super) text: String,
}

pub(super) fn or_note<T: Default>(
    found: Result<T, String>,
    settings: &'static [&'static str],
    wrong: &mut Vec<Mismatch>,
) -> T {
    found.unwrap_or_else(|text| {
        wrong.push(Mismatch { settings, text });
        T::default()
    })
}

pub(super) struct Read {
    pub(super) matches: ArgMatches,
    pub(super) mistakes: Mistakes,
    /// Whether the sub-command is `check`.
    pub(super) checked: bool,
}

/// Reads the arguments, together with the configuration file if the arguments or a variable name one. `serving` lists
/// the sub-commands that take the serving flags.
///
/// # Errors
/// Returns an error from clap. For `check`, invalid values are among the mistakes instead.
pub(super) fn read(command: &mut Command, arguments: &[OsString], serving: &[&str]) -> Result<Read, clap::Error> {
    let mut mistakes = Mistakes::default();
    let mut arguments = arguments.to_vec();
    let checked = arguments.get(1).is_some_and(|name| name == "check");
    let matches = loop {
        match command.try_get_matches_from_mut(&arguments) {
            Ok(matches) => break matches,
            Err(error) if checked && without(&error, command, &mut arguments, &mut mistakes) => {}
            Err(error) => {
                let is_good = |line: &[OsString]| command.clone().try_get_matches_from(line).is_ok();
                return Err(hints::improve(error, command, &arguments, is_good));
            }
        }
    };
    let (name, given) = match matches.subcommand() {
        Some((name, given)) if serving.contains(&name) => (Some(name), given),
        Some(_) => return Ok(Read { matches, mistakes, checked: false }),
        None => (None, &matches),
    };
    let grammar = name.and_then(|name| command.find_subcommand(name)).unwrap_or(command);
    let refused = refused_flags::given(grammar, given);
    if checked {
        mistakes.lines.extend(refused);
    } else if !refused.is_empty() {
        let text = refused.join("\n       ");
        let bin_name = name.map(|name| format!("{} {name}", command.get_name()));
        let mut grammar = grammar.clone();
        if let Some(bin_name) = bin_name {
            grammar = grammar.bin_name(bin_name);
        }
        return Err(grammar.error(clap::error::ErrorKind::UnknownArgument, text));
    }
    let Some(path) = given.get_one::<PathBuf>("config") else { return Ok(Read { matches, mistakes, checked }) };
    let (additions, of_file) = file::read(path, grammar, given);
    mistakes.lines.extend(of_file.lines);
    mistakes.settings.extend(of_file.settings);
    // The settings from the file come after the program's name and the sub-command, and before all other arguments.
    let (before, after) = arguments.split_at(arguments.len().min(1 + usize::from(name.is_some())));
    let mut all = [before, &additions.flags, after].concat();
    if !additions.command.is_empty() {
        all.extend([OsString::from("--")].into_iter().filter(|dashes| !arguments.contains(dashes)));
        all.extend(additions.command);
    }
    let matches = command.try_get_matches_from_mut(all)?;
    Ok(Read { matches, mistakes, checked })
}

/// Removes an invalid value from the arguments or, if the value comes from a variable, the variable from the command,
/// and records the error. Returns false if the error is of a different kind.
fn without(error: &clap::Error, command: &mut Command, arguments: &mut Vec<OsString>, mistakes: &mut Mistakes) -> bool {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    if !matches!(error.kind(), ErrorKind::ValueValidation | ErrorKind::InvalidValue) {
        return false;
    }
    let Some(ContextValue::String(shown)) = error.get(ContextKind::InvalidArg) else { return false };
    // The text has the form `--workers <N>`.
    let Some(flag) = shown.split([' ', '=', '[']).next().and_then(|flag| flag.strip_prefix("--")) else { return false };
    let long = format!("--{flag}");
    let with_value = format!("{long}=");
    let given = |argument: &OsString| *argument == *long || argument.to_string_lossy().starts_with(&with_value);
    let dashes = arguments.iter().position(|argument| argument == "--").unwrap_or(arguments.len());
    let mut is_new = !mistakes.settings.iter().any(|known| known == flag);
    let mut removed = false;
    while let Some(at) = arguments[..dashes.min(arguments.len())].iter().position(given) {
        let count = if arguments[at] == *long { 2 } else { 1 };
        arguments.drain(at..arguments.len().min(at + count));
        removed = true;
    }
    if !removed {
        // The value came from an environment variable.
        let forget = |check: Command| {
            check.mut_args(|argument| {
                if argument.get_long() == Some(flag) {
                    argument.env(clap::builder::Resettable::Reset)
                } else {
                    argument
                }
            })
        };
        let whole = std::mem::take(command);
        *command = whole.mut_subcommand("check", forget).mut_args(|argument| {
            if argument.get_long() == Some(flag) { argument.env(clap::builder::Resettable::Reset) } else { argument }
        });
        is_new |= !mistakes.settings.iter().any(|known| *known == format!("{flag} "));
        mistakes.settings.push(format!("{flag} "));
    }
    if is_new {
        mistakes.lines.push(format!("{long}: {}", file::explain(error)));
        mistakes.settings.push(flag.to_owned());
    }
    // A call that returns true has removed a value or a variable. There are finitely many, so the caller's loop
    // terminates.
    removed || is_new
}

/// Returns the request, or the errors in it.
pub(super) fn conclude(
    request: ServeRequest,
    mut wrong: Vec<Mismatch>,
    mistakes: Mistakes,
    checked: bool,
    command: &mut Command,
) -> Result<Invocation, clap::Error> {
    let request = Box::new(request);
    if checked {
        // If a setting could not be read, errors that result from its absence are not reported.
        let is_unread = |setting: &&str| mistakes.settings.iter().any(|unread| unread == setting);
        wrong.retain(|mismatch| !mismatch.settings.iter().any(is_unread));
        let wrong = wrong.into_iter().map(|mismatch| mismatch.text);
        return Ok(Invocation::Check { request, mistakes: mistakes.lines.into_iter().chain(wrong).collect() });
    }
    if wrong.is_empty() {
        return Ok(Invocation::Serve(request));
    }
    let texts: Vec<String> = wrong.into_iter().map(|mismatch| mismatch.text).collect();
    Err(command.error(clap::error::ErrorKind::ValueValidation, texts.join("\n       ")))
}
