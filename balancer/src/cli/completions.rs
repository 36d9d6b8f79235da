//! `balancer completions`

use anyhow::Result;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, output::print};

/// Print the completions for a shell (changes nothing)
///
/// The shell reads them from a file, or at start-up as shown below.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  balancer completions bash > /etc/bash_completion.d/balancer
  balancer completions zsh > /usr/local/share/zsh/site-functions/_balancer
  balancer completions fish > ~/.config/fish/completions/balancer.fish")]
pub(super) struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    pub(super) fn perform(&self) -> Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "balancer", &mut script);
        print(&String::from_utf8_lossy(&script))
    }
}
