//! Determines whether processes of a different user can access a path. The path's parent directories may admit the
//! master, but not that user.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use caps::Capability;

use crate::config::privileges::{CapabilitySet, PrivilegesConfig};

/// The identity of the workers, if there may be directories that the master can enter but the workers cannot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Visitor {
    user: u32,
    groups: Vec<u32>,
}

impl Visitor {
    /// Returns `None` if the workers can access everything that the master can.
    pub(crate) fn of(config: &PrivilegesConfig) -> Option<Self> {
        let user = config.user.as_ref().filter(|user| !user.uid.is_root())?;
        let above_modes = Capability::CAP_DAC_OVERRIDE.bitmask() | Capability::CAP_DAC_READ_SEARCH.bitmask();
        if config.capabilities.is_some_and(|CapabilitySet(kept)| kept & above_modes != 0) {
            return None;
        }
        let further = config.supplementary_groups.as_ref().map_or(&user.groups, |groups| &groups.0);
        let groups = config.group.or(user.gid).iter().chain(further).map(|group| group.as_raw()).collect();
        Some(Self { user: user.uid.as_raw(), groups })
    }

    /// Returns the outermost directory on the way to directory `path` that this user cannot pass through, or `None` if
    /// the modes let the user pass.
    pub(crate) fn barred_at(&self, path: &Path) -> Option<PathBuf> {
        let path = path.canonicalize().ok()?;
        let mut above: Vec<&Path> = path.ancestors().collect();
        above.reverse();
        let may_pass = |directory: &Path| directory.metadata().is_ok_and(|found| self.may_search(&found));
        above.into_iter().find(|directory| !may_pass(directory)).map(Path::to_owned)
    }

    fn may_search(&self, found: &Metadata) -> bool {
        self.has_search_bit(found.mode(), found.uid(), found.gid())
    }

    /// Whether the process may search a directory with this mode. Of the classes owner, group and others, only the bits
    /// of the first class to which the process belongs apply (path_resolution(7)).
    fn has_search_bit(&self, mode: u32, owner: u32, group: u32) -> bool {
        let shift = match () {
            () if owner == self.user => 6,
            () if self.groups.contains(&group) => 3,
            () => 0,
        };
        mode >> shift & 1 != 0
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_first_matching_class_decides() {
        let visitor = Visitor { user: 7, groups: vec![8, 9] };
        for (mode, owner, group, passes) in [
            (0o711, 0, 0, true),
            (0o700, 0, 0, false),
            (0o700, 7, 0, true),
            (0o077, 7, 9, false),
            (0o710, 0, 9, true),
            (0o701, 0, 9, false),
        ] {
            assert_eq!(visitor.has_search_bit(mode, owner, group), passes, "{mode:o} {owner} {group}");
        }
    }

    #[test]
    fn the_inaccessible_directory_is_named() {
        let top = tempfile::tempdir().unwrap();
        let inner = top.path().join("closed/open");
        std::fs::create_dir_all(&inner).unwrap();
        let closed = inner.parent().unwrap().canonicalize().unwrap();
        let visitor = Visitor { user: 4_000_000_000, groups: Vec::new() };
        for (path, mode) in [(top.path(), 0o711), (closed.as_path(), 0o750)] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        assert_eq!(visitor.barred_at(&inner), Some(closed.clone()));
        std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o711)).unwrap();
        assert_eq!(visitor.barred_at(&inner), None);
    }
}
