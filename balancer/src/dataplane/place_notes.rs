//! What keeps the daemon from placing as it was told, as it notes it for whoever looks.

use std::io;

use super::notes::Note;
use super::paths::Paths;

/// The most sentences that are noted of what there is no room for.
const MOST_LEFT_OUT: usize = 50;
/// The words that lines begin with.
const REFUSED: &str = "refused ";
const LEFT_OUT: &str = "left-out ";

/// What keeps the daemon from placing as it was told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlacingNotes {
    /// Why the programs that place can't be attached: no connect of this node is placed. `None`:
    /// they are, or nobody asked for them.
    pub refused: Option<String>,
    /// What there is no room for in the maps, a sentence each.
    pub left_out: Vec<String>,
}

impl PlacingNotes {
    /// Reads what a daemon has noted; what can't be read is not there.
    pub(super) fn read(paths: &Paths) -> Self {
        let text = Note::placing(paths).read().unwrap_or_default();
        let of = |word: &'static str| {
            let lines = text.lines().filter_map(move |line| line.strip_prefix(word));
            lines.map(str::to_owned)
        };
        let refused = of(REFUSED).next();
        let left_out = of(LEFT_OUT).collect();
        Self { refused, left_out }
    }

    /// Notes it, in place of what was noted.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn write(&self, paths: &Paths) -> io::Result<()> {
        let note = Note::placing(paths);
        if *self == Self::default() {
            note.remove();
            return Ok(());
        }
        note.write(&self.lines())
    }

    fn lines(&self) -> String {
        let refused = self.refused.iter().map(|why| (REFUSED, why.as_str()));
        let left_out = self.left_out.iter().take(MOST_LEFT_OUT);
        let left_out = left_out.map(|what| (LEFT_OUT, what.as_str()));
        let more = self.left_out.len() > MOST_LEFT_OUT;
        let more = more.then_some((LEFT_OUT, "there is more that there is no room for"));
        let all = refused.chain(left_out).chain(more);
        // A log of the verifier may follow the first line.
        let first_line = |text: &str| text.lines().next().unwrap_or_default().to_owned();
        let lines = all.map(|(word, text)| format!("{word}{}", first_line(text)));
        lines.map(|line| line + "\n").collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_read_until_nothing_is_wrong_any_more() {
        let directory = tempfile::tempdir().expect("a directory");
        let paths = Paths::new(directory.path());
        assert_eq!(PlacingNotes::read(&paths), PlacingNotes::default());
        let notes = PlacingNotes {
            refused: Some("another program is there".to_owned()),
            left_out: vec!["no room for `a`".to_owned(), "no room for `b`".to_owned()],
        };
        notes.write(&paths).expect("written");
        assert_eq!(PlacingNotes::read(&paths), notes);
        PlacingNotes::default().write(&paths).expect("removed");
        assert!(!Note::placing(&paths).path().exists());
    }

    #[test]
    fn long_logs_and_lists_are_cut() {
        let directory = tempfile::tempdir().expect("a directory");
        let paths = Paths::new(directory.path());
        let notes = PlacingNotes {
            refused: Some("the verifier says:\nleft-out of its log".to_owned()),
            left_out: vec!["no room".to_owned(); 1_000],
        };
        notes.write(&paths).expect("written");
        let read = PlacingNotes::read(&paths);
        assert_eq!(read.refused.as_deref(), Some("the verifier says:"));
        assert_eq!(read.left_out.len(), MOST_LEFT_OUT + 1);
        PlacingNotes::default().write(&paths).expect("removed");
    }
}
