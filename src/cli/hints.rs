//! What is added to clap's complaints where it cannot know what was meant.

use std::ffi::OsString;

use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};

/// What other programs call a sub-command.
const OTHER_NAMES: [(&str, &str); 19] = [
    (
        "restart",
        "'reload' replaces all workers without losing a request, 'upgrade' the master's program as well; what changes with a \
         restart only needs 'stop', and a start",
    ),
    ("start", "'forkyard run' serves a program; a binary with an application linked in serves without a sub-command"),
    ("serve", "'forkyard run' serves a program; a binary with an application linked in serves without a sub-command"),
    ("quit", "'stop' ends the master"),
    ("shutdown", "'stop' ends the master"),
    ("halt", "'stop --now' ends the master at once"),
    ("kill", "'stop --now' ends the master at once"),
    ("configtest", "'check' looks at the settings"),
    ("test", "'check' looks at the settings"),
    ("validate", "'check' looks at the settings"),
    ("info", "'status' shows the master and its workers"),
    ("ps", "'status' shows the master and its workers"),
    ("list", "'status' shows the master and its workers"),
    ("ls", "'status' shows the master and its workers; there are 'cache ls', 'events ls' and 'quarantine ls'"),
    ("stats", "'status' shows the master and its workers, and 'cache stats' the cache"),
    ("reopen", "'reopen-logs' opens the log files again"),
    ("rotate", "'reopen-logs' opens the log files again"),
    ("workers", "'scale N' changes the number of workers"),
    ("purge", "'cache purge' makes pages out of date"),
];

/// Adds to a complaint about a command line what was probably meant. `is_good` says whether another one would do.
pub(super) fn improve(
    mut error: clap::Error,
    arguments: &[OsString],
    is_good: impl FnMut(&[OsString]) -> bool,
) -> clap::Error {
    let tip = match error.kind() {
        ErrorKind::InvalidSubcommand => named(&error, ContextKind::InvalidSubcommand)
            .and_then(|name| OTHER_NAMES.iter().find(|(other, _)| *other == name).map(|(_, tip)| (*tip).to_owned())),
        ErrorKind::UnknownArgument => {
            named(&error, ContextKind::InvalidArg).and_then(|word| without_dashes(&word, arguments, is_good))
        }
        _ => None,
    };
    if let Some(tip) = tip {
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![StyledStr::from(tip)]));
    }
    error
}

fn named(error: &clap::Error, kind: ContextKind) -> Option<String> {
    match error.get(kind)? {
        ContextValue::String(name) => Some(name.clone()),
        _ => None,
    }
}

/// The line with `--` before this word, if that is what is missing.
fn without_dashes(word: &str, arguments: &[OsString], mut is_good: impl FnMut(&[OsString]) -> bool) -> Option<String> {
    if word.starts_with('-') || arguments.iter().any(|argument| argument == "--") {
        return None;
    }
    let places = arguments.iter().enumerate().skip(2).filter(|(_, argument)| *argument == word);
    let corrected = places.map(|(at, _)| {
        let (before, after) = arguments.split_at(at);
        [before, &[OsString::from("--")], after].concat()
    });
    let good = corrected.into_iter().find(|line| is_good(line))?;
    let words = good.iter().skip(1).map(|word| word.to_string_lossy());
    Some(format!("the program and its arguments stand behind '--': forkyard {}", shell_words::join(words)))
}
