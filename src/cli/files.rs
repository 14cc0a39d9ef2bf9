//! The flags for the files that gateways send.

use clap::Args;

use crate::config::files::{FilesConfig, SendfileDir, StaticDir};

/// Flags that `--direct` excludes.
#[derive(Args, Debug)]
pub(super) struct FileOptions {
    /// Serve the files below DIR under URL, without the program; repeatable
    ///
    /// The longest URL that matches applies. A path without a file is answered with 404; if URL is /, it is passed to the
    /// program. PHP scripts, and names that begin with a dot, except .well-known, are never served.
    #[arg(
        long = "static",
        value_name = "URL=DIR",
        env = "FORKYARD_STATIC",
        value_delimiter = ',',
        help_heading = "Gateways"
    )]
    statics: Vec<StaticDir>,

    /// Send files below DIR if the program names them in X-Sendfile or X-Accel-Redirect; repeatable
    ///
    /// X-Sendfile contains an absolute path below DIR. X-Accel-Redirect contains a URL, and requires the form URL=DIR.
    #[arg(long, value_name = "[URL=]DIR", env = "FORKYARD_SENDFILE", value_delimiter = ',', help_heading = "Gateways")]
    sendfile: Vec<SendfileDir>,
}

impl FileOptions {
    pub(super) fn config(&self) -> FilesConfig {
        FilesConfig { statics: self.statics.clone(), sendfile: self.sendfile.clone() }
    }
}
