"""Models as plain parameter trees and pure functions."""
