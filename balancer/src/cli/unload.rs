//! `balancer unload`

use anyhow::{Context, Result};
use clap::Args;

use super::{Place, hint_of_user, output::print};
use crate::{api::Request, dataplane};

/// Take everything out of the kernel (changes the kernel)
///
/// Established connections stay. From then on the kernel alone decides about new ones; the ports of
/// services with `backends` answer nobody. A running daemon is asked to do it and ends.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Example:
  balancer unload")]
pub(super) struct Unload {}

impl Unload {
    #[expect(clippy::unused_self, reason = "as every verb has it")]
    pub(super) fn perform(&self, place: &Place) -> Result<()> {
        if let Some(message) = place.ask(&Request::Unload)? {
            return print(&format!("{message}\n"));
        }
        let left_open = left_open(place);
        let state_dir = place.state_dir.display();
        let loaded = dataplane::unload(&place.paths())
            .with_context(|| format!("can't unload what is at {state_dir}{}", hint_of_user()))?;
        print(&if loaded {
            format!("unloaded what was at {state_dir} (no daemon was running)\n{left_open}")
        } else {
            format!("nothing was loaded at {state_dir}\n")
        })
    }
}

/// What becomes of connections, in a line; nothing where what is loaded can't be read, which must
/// not be in the way.
fn left_open(place: &Place) -> String {
    let reader = dataplane::open(&place.paths()).ok().flatten();
    let snapshot = reader.and_then(|reader| reader.snapshot().ok());
    let left_open = snapshot.and_then(|snapshot| snapshot.left_open());
    left_open.map_or_else(String::new, |left_open| left_open + "\n")
}
