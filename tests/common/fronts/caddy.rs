//! Configures Caddy without an admin endpoint or certificates. All its files are in the site's directory.

use std::process::Command;

use super::{Place, configuration, daemon};

pub(super) fn command(place: &Place<'_>) -> Command {
    let snippet = &place.snippet;
    let text = format!("{{\n\tadmin off\n\tauto_https off\n\tdefault_bind 127.0.0.1\n}}\n{snippet}");
    let mut command = daemon("caddy");
    for name in ["HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"] {
        command.env(name, place.directory);
    }
    command.args(["run", "--adapter", "caddyfile", "--config"]).arg(configuration(place, &text));
    command
}
