//! What others wrote, made safe for our messages.

/// `text` as it may stand in a message: on one line, without characters that steer a terminal, and
/// cut after `longest` characters.
pub fn for_message(text: &str, longest: usize) -> String {
    let mut short: String = text
        .chars()
        .take(longest)
        .flat_map(char::escape_debug)
        .collect();
    // Quotes are harmless here and read better as they were written.
    short = short.replace("\\\"", "\"").replace("\\'", "'");
    if text.chars().nth(longest).is_some() {
        short.push('…');
    }
    short
}
