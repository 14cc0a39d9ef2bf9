//! Tips that are added to clap's errors.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::Command;
use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Names that other programs use for sub-commands, with a tip for each.
const OTHER_NAMES: [(&str, &str); 20] = [
    ("run", "a binary with a linked application serves without a sub-command; 'forkyard run' runs a program"),
    (
        "restart",
        "'reload' replaces all workers without losing a request, 'upgrade' also the master's program; settings that cannot \
         change in a running master require 'stop' and a start",
    ),
    ("start", "'forkyard run' runs a program; a binary with a linked application serves without a sub-command"),
    ("serve", "'forkyard run' runs a program; a binary with a linked application serves without a sub-command"),
    ("quit", "'stop' stops the master"),
    ("shutdown", "'stop' stops the master"),
    ("halt", "'stop --now' stops the master immediately"),
    ("kill", "'stop --now' stops the master immediately"),
    ("configtest", "'check' reports errors in the settings"),
    ("test", "'check' reports errors in the settings"),
    ("validate", "'check' reports errors in the settings"),
    ("info", "'status' shows the master and its workers"),
    ("ps", "'status' shows the master and its workers"),
    ("list", "'status' shows the master and its workers"),
    ("ls", "'status' shows the master and its workers; see also 'cache ls', 'events ls' and 'quarantine ls'"),
    ("stats", "'status' shows the master and its workers, 'cache stats' the cache"),
    ("reopen", "'reopen-logs' reopens the log files"),
    ("rotate", "'reopen-logs' reopens the log files"),
    ("workers", "'scale N' changes the number of workers"),
    ("purge", "'cache purge' purges pages"),
];

/// Adds a tip to an error about a command line. `is_good` tests whether another command line would be valid.
pub(super) fn improve(
    mut error: clap::Error,
    command: &Command,
    arguments: &[OsString],
    mut is_good: impl FnMut(&[OsString]) -> bool,
) -> clap::Error {
    let tip = match error.kind() {
        ErrorKind::InvalidSubcommand => named(&error, ContextKind::InvalidSubcommand)
            .and_then(|name| OTHER_NAMES.iter().find(|(other, _)| *other == name).map(|(_, tip)| (*tip).to_owned())),
        ErrorKind::UnknownArgument => {
            let word = named(&error, ContextKind::InvalidArg).unwrap_or_default();
            rearranged(command, arguments, &mut is_good)
                .or_else(|| without_name_of_flag(&word, arguments, &mut is_good))
                .or_else(|| without_dashes(|this| this == word.as_str(), arguments, &mut is_good))
        }
        ErrorKind::ArgumentConflict => rearranged(command, arguments, &mut is_good),
        ErrorKind::MissingRequiredArgument => without_a_choice(&error),
        _ => None,
    };
    if let Some(tip) = tip {
        // clap would also print its own suggestion, which is for a different flag.
        error.remove(ContextKind::SuggestedArg);
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![StyledStr::from(tip)]));
    }
    error
}

/// Returns the command line with its sub-command first, or without a superfluous `run`, if that makes it valid.
fn rearranged(
    command: &Command,
    arguments: &[OsString],
    is_good: &mut impl FnMut(&[OsString]) -> bool,
) -> Option<String> {
    let in_front = with_sub_command_in_front(command, arguments);
    if in_front != arguments && is_good(&in_front) {
        return Some(format!("flags come after the sub-command: {}", shown(&in_front)));
    }
    let end = arguments.iter().position(|argument| argument == "--").unwrap_or(arguments.len());
    let run = arguments[..end].iter().position(|argument| argument == "run")?;
    let mut without_run = arguments.to_vec();
    without_run.remove(run);
    let lines = [with_sub_command_in_front(command, &without_run), without_run];
    if let Some(line) = lines.iter().find(|line| is_good(line)) {
        return Some(format!("only one sub-command can be given: {}", shown(line)));
    }
    lines.iter().find_map(|line| without_dashes(|_| true, line, is_good))
}

/// Returns the words of the sub-command, wherever they are, followed by the other arguments.
fn with_sub_command_in_front(command: &Command, arguments: &[OsString]) -> Vec<OsString> {
    let (program, rest) = arguments.split_at(arguments.len().min(1));
    let end = rest.iter().position(|argument| argument == "--").unwrap_or(rest.len());
    let (mut at, mut names, mut others) = (command, Vec::new(), Vec::new());
    for argument in &rest[..end] {
        match argument.to_str().and_then(|name| at.find_subcommand(name)) {
            Some(found) => {
                names.push(argument.clone());
                at = found;
            }
            None => others.push(argument.clone()),
        }
    }
    [program, &names, &others, &rest[end..]].concat()
}

/// Returns the command line with `--control` before this word, if that makes it valid.
fn without_name_of_flag(
    word: &str,
    arguments: &[OsString],
    is_good: &mut impl FnMut(&[OsString]) -> bool,
) -> Option<String> {
    let at = arguments.iter().position(|argument| argument == word).filter(|_| !word.starts_with('-'))?;
    let mut line = arguments.to_vec();
    line.insert(at, OsString::from("--control"));
    is_good(&line).then(|| format!("the control socket is named with --control: {}", shown(&line)))
}

/// Returns the alternatives, if a required choice is missing.
fn without_a_choice(error: &clap::Error) -> Option<String> {
    const TIPS: [(&str, &str); 2] = [
        ("--prefix", "name a page by its key, or pages by --tag or --prefix; 'cache clear' purges all pages"),
        ("--all", "name a request as 'quarantine ls' shows it, or release all with --all"),
    ];
    let Some(ContextValue::Strings(missing)) = error.get(ContextKind::InvalidArg) else { return None };
    let tip = TIPS.iter().find(|(flag, _)| missing.iter().any(|missing| missing.contains(flag)));
    tip.map(|(_, tip)| (*tip).to_owned())
}

fn shown(line: &[OsString]) -> String {
    let name = line.first().and_then(|path| Path::new(path).file_name()).unwrap_or_default();
    let words = [name].into_iter().chain(line.iter().skip(1).map(OsString::as_os_str));
    shell_words::join(words.map(|word| word.to_string_lossy()))
}

fn named(error: &clap::Error, kind: ContextKind) -> Option<String> {
    match error.get(kind)? {
        ContextValue::String(name) => Some(name.clone()),
        _ => None,
    }
}

/// Returns the command line with `--` before one of `these` words, if that makes it valid.
fn without_dashes(
    these: impl Fn(&OsStr) -> bool,
    arguments: &[OsString],
    is_good: &mut impl FnMut(&[OsString]) -> bool,
) -> Option<String> {
    if arguments.iter().any(|argument| argument == "--") {
        return None;
    }
    let is_word = |argument: &OsString| !argument.to_string_lossy().starts_with('-') && these(argument);
    let places = arguments.iter().enumerate().skip(2).filter(|(_, argument)| is_word(argument));
    let corrected = places.map(|(at, _)| {
        let (before, after) = arguments.split_at(at);
        [before, &[OsString::from("--")], after].concat()
    });
    let good = corrected.into_iter().find(|line| is_good(line))?;
    Some(format!("the program and its arguments come after '--': {}", shown(&good)))
}
